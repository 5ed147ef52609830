"""Robustness report: JSON and one HTML file that needs no other (extra ``[report]``)."""

from pathlib import Path
from typing import Any

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.pages.page import HTML, Head, render
from advmoe_deploy.cli.pages.pictures import MOST_PICTURES, side
from advmoe_deploy.cli.robustness import Seen
from advmoe_deploy.cli.tables.robustness import certified_text
from advmoe_deploy.cli.verdicts.robust import model_only, robust_verdict
from advmoe_deploy.verify.examples.convergence import lines_of
from advmoe_deploy.verify.examples.entry import Robustness
from advmoe_deploy.verify.examples.rerouted import Rerouted, moves


def write_report(seen: Seen, bundle: Bundle, folder: Path, name: str, *, threads: int = 0) -> None:
    """Write the entry of ``seen`` as the JSON file ``name``, and its page, into ``folder``."""
    entry = seen.entry
    (folder / name).write_text(entry.model_dump_json(indent=2) + "\n", encoding="utf-8")
    measured = entry.advmoe
    lines = lines_of(measured.convergence)
    page = render(
        "pages/robust_report.html.jinja",
        Head("advmoe report", entry.model_name, robust_verdict(measured), _warnings(measured)),
        versions=measured.versions,
        threads=threads,
        entry=entry,
        measured=measured,
        model=bundle.manifest.model,
        pgd=model_only(measured.engines[0]),
        lines=lines,
        steps=[f"{row.steps} steps" for row in lines[0]],
        certified=certified_text(measured.certified),
        rerouted=[_shown(image, seen, bundle) for image in measured.rerouted[:MOST_PICTURES]],
        fallen=int((seen.examples.attack_N >= 0).sum()),
        moves=moves(measured.rerouted),
    )
    (folder / HTML).write_text(page, encoding="utf-8")


def _warnings(measured: Robustness) -> list[str]:
    """Return the warnings of all engines, each once, and whose it is where not all share it."""
    said: dict[str, list[str]] = {}
    for report in measured.engines:
        for warning in report.warnings:
            said.setdefault(warning, []).append(report.engine)
    every = len(measured.engines)
    return [w if len(by) == every else f"{', '.join(by)}: {w}" for w, by in said.items()]


def _shown(image: Rerouted, seen: Seen, bundle: Bundle) -> dict[str, Any]:
    names, index = bundle.manifest.class_names, image.index
    return {
        "index": index,
        "label": names[image.label],
        "clean": side(seen.clean_NCHW[index], image.clean_answer, image.label, names),
        "attacked": side(
            seen.examples.images_NCHW[index], image.attacked_answer, image.label, names
        ),
        "attack": seen.entry.advmoe.engines[0].attacks[image.attack].title,
        "layers": image.layers,
    }

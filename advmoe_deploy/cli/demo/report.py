"""HTML report of the demo: one file that needs no other (extra ``[report]``)."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advmoe_deploy.attacks.white_box import attack_model
from advmoe_deploy.bundle import open_bundle
from advmoe_deploy.cli.demo.result import MOE, DemoResult
from advmoe_deploy.cli.pages.page import Head, render
from advmoe_deploy.cli.pages.pictures import side
from advmoe_deploy.cli.pages.plots import (
    draw_expert_load,
    draw_latency,
    draw_robustness,
    plot_of,
    svg_of,
)
from advmoe_deploy.cli.pages.profile_report import latency_values
from advmoe_deploy.cli.verdicts.latency import latency_verdict
from advmoe_deploy.cli.verdicts.robust import export_verdict, withstands
from advmoe_deploy.cli.verdicts.said import Said
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.files import write_atomically
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.reports.versions import installed_versions
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.specs import AttackSpec


def write_demo_report(result: DemoResult, out: Path) -> None:
    """Write ``report.html``, ``summary.svg`` and ``result.json`` into ``out``."""
    curves = partial(
        draw_robustness, curves=result.curves, trained_for=result.verify.threat.epsilon
    )
    load = partial(draw_expert_load, load_CE=result.load_by_class, class_names=result.class_names)
    photographs = result.photographs
    html = render(
        "demo/report.html.jinja",
        _head(result),
        versions=installed_versions(),
        threads=result.profile.rows[0].threads,
        result=result,
        plots={"robustness": plot_of("robustness", curves), "load": plot_of("load", load)},
        digits_latency=latency_values(result.profile, "digits"),
        photographs_latency=photographs and latency_values(photographs.profile, "photographs"),
        gallery=_gallery(out, result),
    )
    write_atomically(out / "report.html", html.encode())
    summary = svg_of("summary", [curves, partial(draw_latency, report=result.profile)])
    write_atomically(out / "summary.svg", summary.encode())
    write_atomically(out / "result.json", result.model_dump_json(indent=2).encode())


def _head(result: DemoResult) -> Head:
    verified, photographs = result.verify, result.photographs
    digits = [export_verdict(verified), withstands(verified), latency_verdict(result.profile)[0]]
    said = [("digits", each) for each in digits]
    if photographs:
        first = latency_verdict(photographs.profile)[0]
        said = [(photographs.evaluation.data, first), *said]
    verdict = [Said(f"{data}: {each.text}", each.tone) for data, each in said]
    quick = ["quick form: one epoch, too little to be robust"] * result.quick
    subject = f"{photographs.evaluation.data} and digits" if photographs else "digits"
    return Head("advmoe demo", subject, verdict, [*quick, *result.warnings(), *verified.warnings])


def _gallery(out: Path, result: DemoResult) -> list[dict[str, Any]]:
    """Return one test image per class, clean and attacked, with the exported model's answers."""
    data = load_dataset("digits")
    first_C = [int(np.flatnonzero(data.test.labels == c)[0]) for c in range(len(data.class_names))]
    clean, labels = to_float(data.test.images[first_C]), data.test.labels[first_C]
    _, model = load_checkpoint(out / "runs" / MOE / "model")
    attack = AttackSpec(name="pgd", steps=50)
    x, y = torch.from_numpy(clean), torch.from_numpy(labels)
    attacked = attack_model(model, x, y, result.verify.threat, attack).numpy()
    with open_runner(open_bundle(out / "bundle")) as runner:
        answers = [runner.infer(images) for images in (clean, attacked)]
    cells = []
    for index, label in enumerate(labels):
        cell: dict[str, Any] = {"label": data.class_names[label]}
        for kind, images, answer in zip(
            ("clean", "attacked"), (clean, attacked), answers, strict=True
        ):
            (ids_NK,) = answer.expert_ids.values()
            guess = int(answer.logits[index].argmax())
            shown = side(images[index], guess, int(label), data.class_names)
            cell[kind] = {**shown, "expert": int(ids_NK[index, 0])}
        cell["rerouted"] = cell["clean"]["expert"] != cell["attacked"]["expert"]
        cells.append(cell)
    return cells

"""The command ``report``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advmoe_deploy.cli.commands.verify import refusal
from advmoe_deploy.cli.options import (
    AllowFragile,
    BundlePath,
    ClassMap,
    Data,
    Engines,
    Epsilon,
    Json,
    Overwrite,
    Suite,
    Threads,
    use_torch_threads,
)
from advmoe_deploy.cli.session import session
from advmoe_deploy.errors import UsageError

if TYPE_CHECKING:
    from advmoe_deploy.verify.report import AttackOutcome

REPORT = "report.json"


def report(
    bundle: BundlePath,
    engine: Engines = None,
    data: Data = None,
    class_map: ClassMap = None,
    attacks: Annotated[Suite, typer.Option("--attacks", help="How hard to attack.")] = Suite.quick,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Test images; by default all.")
    ] = None,
    epsilon: Epsilon = None,
    max_drop: Annotated[
        float, typer.Option("--max-drop", min=0.0, help="Accuracy it may lose, in points.")
    ] = 0.5,
    out: Annotated[
        Path | None,
        typer.Option("--out", readable=False, help="By default BUNDLE-report beside it."),
    ] = None,
    card: Annotated[
        bool,
        typer.Option("--card/--no-card", help="Write the figures on the bundle's MODEL_CARD.md."),
    ] = True,
    overwrite: Overwrite = False,
    allow_fragile: AllowFragile = False,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Verify a bundle and write a page about it.

    It also writes JSON like RobustBench's and the examples that were found, and exits as verify
    does.
    """
    if len(set(engine or ())) < len(engine or ()):
        raise UsageError(f"--engine: {', '.join(engine or ())} names one twice; name each once")
    use_torch_threads(threads)
    with session(as_json, loads=True) as ui:
        from advmoe_deploy.api import open_bundle
        from advmoe_deploy.bundle import CARD
        from advmoe_deploy.cli.pages import page as pages
        from advmoe_deploy.cli.pages import robust_report
        from advmoe_deploy.cli.robustness import VerifyOptions, put_on_card, robustness_of, worst
        from advmoe_deploy.cli.tables import bundle as tables
        from advmoe_deploy.cli.tables import robustness as robustness_tables
        from advmoe_deploy.data.matching import read_class_map
        from advmoe_deploy.files import refuse_existing, staged_directory
        from advmoe_deploy.runtime.select import engine_for
        from advmoe_deploy.zoo.resolve import place_for

        pages.require_libraries()
        opened = open_bundle(bundle)
        engines = tuple(engine or [engine_for(opened, None, ui.progress.note)])
        beside = bundle.resolve().with_name(f"{bundle.resolve().name}-report")
        target = out or place_for(bundle, opened.path, "report", beside)
        refuse_existing(target, overwrite=overwrite, marker=REPORT)
        options = VerifyOptions(
            engines=engines,
            attacks=attacks.value,
            data=data,
            class_map=read_class_map(class_map),
            images=images,
            epsilon=epsilon,
            max_drop=max_drop,
            threads=threads,
            allow_fragile=allow_fragile,
        )
        measured: list[AttackOutcome] = []
        with (
            ui.keeping(measured, lambda: tables.attack_outcomes(measured, ", then ".join(engines))),
            staged_directory(target, overwrite=overwrite) as staged,
        ):
            seen = robustness_of(opened, options, staged, measured=measured, progress=ui.progress)
            robust_report.write_report(seen, opened, staged, REPORT, threads=threads)
        trouble = put_on_card(opened, seen.entry.advmoe) if card else None
        file = opened.path / CARD if card and trouble is None else None
        value = {"out": str(target), "card": file and str(file)}
        value |= seen.entry.model_dump(mode="json")
        ui.show(value, lambda: robustness_tables.screen(seen.entry, target, file))
    answer = worst(seen.entry.advmoe.engines)
    if answer.verdict != "passed":
        refused = refusal(answer)
        raise type(refused)(f"{refused}; {trouble}") if trouble else refused
    if trouble:
        raise trouble

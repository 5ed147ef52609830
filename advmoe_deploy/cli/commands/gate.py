"""The command ``gate``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advmoe_deploy.cli.options import (
    AllowFragile,
    BundlePath,
    ClassMap,
    Data,
    Engine,
    Json,
    Suite,
    Threads,
    require_places,
    use_torch_threads,
)
from advmoe_deploy.cli.session import session
from advmoe_deploy.errors import AdvMoEError, CheckFailedError, UndecidedError

if TYPE_CHECKING:
    from advmoe_deploy.verify.examples.gate import GateReport
    from advmoe_deploy.verify.report import AttackOutcome


def gate(
    bundle: BundlePath,
    against: Annotated[
        Path,
        typer.Option(
            "--against",
            readable=False,
            metavar="BASELINE.json",
            help="report.json of 'advmoe report', with its examples.npz beside it.",
        ),
    ],
    engine: Engine = None,
    data: Data = None,
    class_map: ClassMap = None,
    attacks: Annotated[Suite, typer.Option("--attacks", help="How hard to attack.")] = Suite.quick,
    max_drop: Annotated[
        float, typer.Option("--max-drop", min=0.0, help="Accuracy it may lose, in points.")
    ] = 2.0,
    junit: Annotated[
        Path | None,
        typer.Option("--junit", readable=False, metavar="FILE.xml", help="A test case per check."),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", readable=False, metavar="FILE.md", help="A summary."),
    ] = None,
    allow_fragile: AllowFragile = False,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Hold a bundle against a baseline.

    Exit 1 if it lost accuracy, 6 if undecided.
    """
    require_places({"--junit": junit, "--markdown": markdown})
    use_torch_threads(threads)
    with session(as_json, loads=True) as ui:
        from advmoe_deploy.api import open_bundle
        from advmoe_deploy.cli.pages import gate_files
        from advmoe_deploy.cli.tables import bundle as tables
        from advmoe_deploy.cli.tables import robustness as robustness_tables
        from advmoe_deploy.data.matching import read_class_map
        from advmoe_deploy.files import write_output
        from advmoe_deploy.runtime.select import engine_for
        from advmoe_deploy.verify.examples.baseline import read_baseline
        from advmoe_deploy.verify.examples.gate import Conditions, gate_bundle

        opened, baseline = open_bundle(bundle), read_baseline(against)
        asked = engine_for(opened, engine, ui.progress.note)
        how = Conditions(
            asked,
            data,
            read_class_map(class_map),
            attacks.value,
            max_drop,
            threads,
            allow_fragile,
        )
        measured: list[AttackOutcome] = []
        with ui.keeping(measured, lambda: tables.attack_outcomes(measured, asked)):
            report = gate_bundle(opened, baseline, how, measured=measured, progress=ui.progress)
        ui.show(report.model_dump(mode="json"), lambda: robustness_tables.gate_report(report))
        if junit is not None:
            write_output(junit, gate_files.junit(report))
        if markdown is not None:
            write_output(markdown, gate_files.markdown(report))
    if report.verdict != "passed":
        raise _refusal(report)


def _refusal(report: "GateReport") -> AdvMoEError:
    first = next(check for check in report.checks if check.verdict == report.verdict)
    said = f"{first.name}: {first.message}"
    if report.report.findings:  # which nothing allows
        return CheckFailedError(f"{said}; do not ship this bundle")
    allow = "raise --max-drop"
    if report.report.fragility:  # which no limit mends; losses may have come on top
        export = report.checks[-1].name
        allow = "pass --allow-fragile" if first.name == export else f"{allow} and --allow-fragile"
    if report.verdict == "failed":
        return CheckFailedError(f"{said}; do not ship this bundle, or {allow}")
    return UndecidedError(f"{said}; keep a baseline of more images, or {allow}")

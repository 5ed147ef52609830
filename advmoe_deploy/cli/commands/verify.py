"""The command ``verify``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advmoe_deploy.cli.options import (
    AllowFragile,
    BundlePath,
    ClassMap,
    Data,
    Engine,
    Epsilon,
    Json,
    SignedBy,
    Suite,
    Threads,
    require_places,
    seconds_of,
    use_torch_threads,
)
from advmoe_deploy.cli.session import session
from advmoe_deploy.errors import AdvMoEError, CheckFailedError, UndecidedError

if TYPE_CHECKING:
    from advmoe_deploy.verify.report import AttackOutcome, ReferenceReport, RobustReport


def verify(
    bundle: BundlePath,
    engine: Engine = None,
    require_signature: SignedBy = None,
    data: Data = None,
    class_map: ClassMap = None,
    attacks: Annotated[Suite, typer.Option("--attacks", help="How hard to attack.")] = Suite.quick,
    max_drop: Annotated[
        float, typer.Option("--max-drop", min=0.0, help="Accuracy it may lose, in points.")
    ] = 0.5,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Test images; by default all.")
    ] = None,
    epsilon: Epsilon = None,
    save_examples: Annotated[
        Path | None,
        typer.Option(
            "--save-examples",
            readable=False,
            metavar="FILE.npz",
            help="Keep the adversarial image that each image fell to first.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            readable=False,
            metavar="FILE.npz",
            help="Keep the state after each attack here, and go on from it.",
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            metavar="TIME",
            help="Time for attacks, such as 10m: what is left goes into restarts; of a suite that "
            "takes longer the rest is left out, with a warning.",
        ),
    ] = "0s",
    allow_fragile: AllowFragile = False,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Attack the model and its export alike, and compare them.

    Exit 1 if robustness was lost, 6 if undecided.
    """
    seconds = seconds_of(budget)
    require_places({"--save-examples": save_examples, "--resume": resume})
    use_torch_threads(threads)
    with session(as_json, loads=True) as ui:
        from advmoe_deploy.api import open_bundle
        from advmoe_deploy.cli.tables import bundle as tables
        from advmoe_deploy.data.matching import read_class_map
        from advmoe_deploy.runtime.select import engine_for
        from advmoe_deploy.verify.verify import verify_bundle

        opened = open_bundle(bundle, signed_by=require_signature)
        asked = engine_for(opened, engine, ui.progress.note)
        measured: list[AttackOutcome] = []
        if resume is not None:
            ui.resumable(has_state=resume.is_file)
        with ui.keeping(measured, lambda: tables.attack_outcomes(measured, asked)):
            report = verify_bundle(
                opened,
                engine=asked,
                data=data,
                class_map=read_class_map(class_map),
                attacks=attacks.value,
                max_drop=max_drop,
                images=images,
                epsilon=epsilon,
                threads=threads,
                allow_fragile=allow_fragile,
                measured=measured,
                examples=save_examples,
                resume=resume,
                budget=seconds,
                progress=ui.progress,
            )
        ui.show(report.model_dump(mode="json"), lambda: tables.robust_report(report))
    if report.verdict != "passed":
        raise refusal(report)


def _of_reference(reference: "ReferenceReport") -> AdvMoEError:
    if reference.verdict == "undecided":
        return UndecidedError(f"{reference}; attack more images, or pass --allow-fragile")
    return CheckFailedError(
        f"{reference}; train it for longer or by another recipe, take a smaller --epsilon, or pass "
        "--allow-fragile"
    )


def _drops(report: "RobustReport") -> str:
    clean, robust = report.clean_drop, report.robust_drop
    said = f"clean accuracy {_fell(clean.drop)}, robust accuracy {_fell(robust.drop)}"
    if report.consistency.same_function:
        said = f"{clean.counted()} as they are, {robust.counted()} under attack"
    return f"{said}; the limit is {report.max_drop:g} points"


def _fell(drop: float) -> str:
    return f"{'rose' if drop < 0 else 'fell'} by {abs(drop):.2f} points"


def refusal(report: "RobustReport") -> AdvMoEError:
    """Return the error that says why the verdict of ``report`` is not passed."""
    if report.findings:
        first = report.findings[0]
        more = f" (and {len(report.findings) - 1} more)" if len(report.findings) > 1 else ""
        return CheckFailedError(f"{first.kind}: {first.message}{more}")
    reference = report.reference
    # Of two reasons the graver: a loss is one whatever is known of the reference.
    if report.fragility and reference is not None and reference.verdict == report.verdict:
        return _of_reference(reference)
    drops = _drops(report)
    if report.verdict == "failed":
        return CheckFailedError(f"{drops}; do not ship this bundle, or raise --max-drop")
    undecided = [
        f"{name} accuracy is {drop.judgement()}"
        for name, drop in (("clean", report.clean_drop), ("robust", report.robust_drop))
        if drop.verdict == "undecided"
    ]
    return UndecidedError(f"{drops}; {', '.join(undecided)}")

"""The commands that measure a bundle: verify, profile."""

from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.cli.options import (
    BundlePath,
    Data,
    Engine,
    Json,
    Suite,
    Threads,
    names,
    positive_numbers,
)
from advmoe_deploy.cli.session import session
from advmoe_deploy.errors import CheckFailedError, UsageError, unknown_name
from advmoe_deploy.profiling.baselines import BASELINES


def verify(
    bundle: BundlePath,
    engine: Engine = "onnxruntime",
    data: Data = None,
    attacks: Annotated[Suite, typer.Option("--attacks", help="How hard to attack.")] = Suite.quick,
    max_drop: Annotated[
        float, typer.Option("--max-drop", min=0.0, help="Accuracy it may lose, in points.")
    ] = 0.5,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Test images; by default all.")
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            "--epsilon", help="l-inf radius in [0, 1] pixels; by default the model's own."
        ),
    ] = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Attack the model and its export alike; exit 1 if robustness did not survive."""
    with session(as_json) as ui:
        from advmoe_deploy.bundle import open_bundle
        from advmoe_deploy.cli import tables
        from advmoe_deploy.verify.verify import verify_bundle

        report = verify_bundle(
            open_bundle(bundle),
            engine=engine,
            data=data,
            attacks=attacks.value,
            max_drop=max_drop,
            images=images,
            epsilon=epsilon,
            threads=threads,
            progress=ui.progress,
        )
        ui.show(report.model_dump(mode="json"), lambda: tables.robust_report(report))
    if not report.passed:
        clean, robust = report.clean_accuracy, report.robust_accuracy
        raise CheckFailedError(
            f"clean accuracy fell by {100 * (clean.reference - clean.engine):.2f} points, robust "
            f"accuracy by {100 * (robust.reference - robust.engine):.2f}; the limit is "
            f"{max_drop:g}; "
            "do not ship this bundle, or raise --max-drop"
        )


def profile(
    bundle: BundlePath,
    engine: Annotated[
        list[str] | None, typer.Option("--engine", help="Repeatable; by default onnxruntime.")
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes.")] = "1,8,64",
    against: Annotated[
        str, typer.Option("--against", help="Baselines to time in turn; '' for none.")
    ] = ",".join(BASELINES),
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the engine.")] = 2,
    out: Annotated[Path | None, typer.Option("--out", help="Write the report as JSON.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with plots (extra [report]).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time the model against its baselines, in turn, in one process."""
    batches, baselines = positive_numbers(batch, "--batch"), names(against)
    for baseline in baselines:
        if baseline not in BASELINES:
            raise unknown_name("baseline", baseline, BASELINES)
    for option, file in (("--out", out), ("--html", html)):
        if file is not None and file.is_dir():
            raise UsageError(f"{option}: {file} is a directory; name a file in it")
    with session(as_json) as ui:
        from advmoe_deploy.bundle import open_bundle
        from advmoe_deploy.cli import tables
        from advmoe_deploy.files import write_atomically
        from advmoe_deploy.profiling.profile import profile_bundle

        if html is not None:
            from advmoe_deploy.cli import pages, profile_report

            pages.require_libraries()
        opened = open_bundle(bundle)
        report = profile_bundle(
            opened,
            engines=tuple(engine or ("onnxruntime",)),
            batches=batches,
            against=baselines,
            threads=threads,
            progress=ui.progress,
        )
        # Shown first: a file that cannot be written takes no measurement with it.
        ui.show(report.model_dump(mode="json"), lambda: tables.latency_report(report))
        if out is not None:
            write_atomically(out, (report.model_dump_json(indent=2) + "\n").encode())
        if html is not None:
            profile_report.write_profile_report(report, opened, html)

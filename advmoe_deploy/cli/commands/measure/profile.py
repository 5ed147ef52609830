"""The command ``profile``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advmoe_deploy.cli.options import (
    BundlePath,
    Engines,
    Json,
    names,
    positive_numbers,
    require_places,
)
from advmoe_deploy.cli.session import session
from advmoe_deploy.errors import unknown_name
from advmoe_deploy.process import usable_cpus, use_threads
from advmoe_deploy.profiling.baselines import BASELINES

if TYPE_CHECKING:
    from advmoe_deploy.reports import LatencyRow


def profile(
    bundle: BundlePath,
    engine: Engines = None,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes.")] = "1,8,64",
    against: Annotated[
        str, typer.Option("--against", help="Baselines to time in turn; '' for none.")
    ] = ",".join(BASELINES),
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="CPU threads, of the engine and all else.")
    ] = min(2, usable_cpus()),
    out: Annotated[
        Path | None, typer.Option("--out", readable=False, help="Write the report as JSON.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", readable=False, help="Write a page with plots (extra [report])."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time the model against its baselines, in turn, in one process."""
    batches, baselines = positive_numbers(batch, "--batch"), names(against)
    for baseline in baselines:
        if baseline not in BASELINES:
            raise unknown_name("baseline", baseline, BASELINES)
    require_places({"--out": out, "--html": html})
    use_threads(threads)
    with session(as_json) as ui:
        from advmoe_deploy.api import open_bundle
        from advmoe_deploy.cli.tables import latency as tables
        from advmoe_deploy.files import write_output
        from advmoe_deploy.profiling.profile import profile_bundle

        if html is not None:
            from advmoe_deploy.cli.pages import page as pages
            from advmoe_deploy.cli.pages import profile_report

            pages.require_libraries()
        opened = open_bundle(bundle)
        measured: list[LatencyRow] = []
        with ui.keeping(measured, lambda: tables.latency_rows(measured)):
            report = profile_bundle(
                opened,
                engines=engine or None,
                batches=batches,
                against=baselines,
                threads=threads,
                measured=measured,
                progress=ui.progress,
            )
        # Shown first: a file that cannot be written takes no measurement with it.
        ui.show(report.model_dump(mode="json"), lambda: tables.latency_report(report))
        if out is not None:
            write_output(out, (report.model_dump_json(indent=2) + "\n").encode())
        if html is not None:
            profile_report.write_profile_report(report, opened, html)

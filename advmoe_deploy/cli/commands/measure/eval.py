"""The command ``eval``."""

from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.cli.completion import engines, named_models
from advmoe_deploy.cli.options import NAMED, ClassMap, Data, Json, Threads, require_places
from advmoe_deploy.cli.session import session
from advmoe_deploy.process import use_threads


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            readable=False,
            metavar="RUN|BUNDLE",
            autocompletion=named_models,
            help=f"What 'train', 'import' or 'export' wrote{NAMED}",
        ),
    ],
    data: Data = None,
    class_map: ClassMap = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="NAME[:PRECISION]",
            autocompletion=engines,
            help="Of a bundle; 'advmoe list engines' names them. A run is computed by PyTorch.",
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Test images; by default all.")
    ] = None,
    report_file: Annotated[
        Path | None,
        typer.Option(
            "--report",
            readable=False,
            metavar="FILE.html",
            help="Write a page that needs no other file (extra [report]).",
        ),
    ] = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Measure clean accuracy, by class too; nothing is attacked.

    With intervals, calibration and the use of the experts.
    """
    require_places({"--report": report_file})
    use_threads(threads)
    with session(as_json, loads=True) as ui:
        from advmoe_deploy import api
        from advmoe_deploy.cli.tables import evaluation as tables
        from advmoe_deploy.data.matching import read_class_map

        if report_file is not None:
            from advmoe_deploy.cli.pages import page as pages

            pages.require_libraries()
        report = api.evaluate(
            model,
            engine=engine,
            data=data,
            class_map=read_class_map(class_map),
            images=images,
            threads=threads,
            progress=ui.progress,
        )
        # Shown first: a file that cannot be written takes no measurement with it.
        ui.show(report.model_dump(mode="json"), lambda: tables.evaluation_report(report))
        if report_file is not None:
            from advmoe_deploy.cli.pages.eval_report import write_eval_report

            write_eval_report(report, report_file, threads=threads)

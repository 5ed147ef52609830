"""The command ``eval``."""

from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.cli.options import NAMED, ClassMap, Data, Json, Threads
from advmoe_deploy.cli.session import session
from advmoe_deploy.process import use_threads


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            readable=False,
            metavar="RUN|BUNDLE",
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
            help="Of a bundle; 'advmoe list engines' names them. A run is computed by PyTorch.",
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Test images; by default all.")
    ] = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Measure clean accuracy: with its interval, by class, with calibration; no attacks."""
    use_threads(threads)
    with session(as_json) as ui:
        from advmoe_deploy import api
        from advmoe_deploy.cli.tables import evaluation as tables
        from advmoe_deploy.data.matching import read_class_map

        report = api.evaluate(
            model,
            engine=engine,
            data=data,
            class_map=read_class_map(class_map),
            images=images,
            threads=threads,
            progress=ui.progress,
        )
        ui.show(report.model_dump(mode="json"), lambda: tables.evaluation_report(report))

"""The command ``train``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.cli.options import Data, Json, Overwrite, Threads, use_torch_threads
from advmoe_deploy.cli.session import session


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="'advmoe list recipes' names them.")
    ],
    data: Data = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", readable=False, help="Run directory; by default runs/RECIPE."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Overwrite = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a field of the recipe; repeatable."
        ),
    ] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="Processes or GPUs.")] = 1,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Train a model adversarially by a recipe."""
    use_torch_threads(threads, processes=devices)
    with session(as_json) as ui:
        from advmoe_deploy import api
        from advmoe_deploy.cli.tables import training as training_tables

        report = api.train(
            recipe,
            out,
            data=data,
            settings=settings or (),
            resume=resume,
            overwrite=overwrite,
            devices=devices,
            progress=ui.progress,
        )
        if os.environ.get("RANK", "0") == "0":  # torchrun starts one such process per device
            ui.show(report.model_dump(mode="json"), lambda: training_tables.train_report(report))

"""The command ``train``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.cli.options import Data, Json, Overwrite, Threads, with_short
from advmoe_deploy.cli.session import Session, session
from advmoe_deploy.process import use_threads


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="'advmoe list recipes' names them; for a folder of your own also advmoe, at-moe, "
            "dense, s-dense, whose settings are chosen for its images.",
        ),
    ],
    data: Data = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN|zoo:NAME|FILE",
            help="Fine-tune: take network and weights of a run, a model with a name, a bundle or "
            "weights.safetensors of a checkpoint.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            readable=False,
            help="Run directory; by default runs/RECIPE, or runs/FOLDER-RECIPE of a family.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Overwrite = False,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Short for --set epochs=N.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Short for --set seed=N.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            metavar="PIXELS",
            help="Size that images are scaled to, 8 to 512; short for --set model.image_size=N.",
        ),
    ] = None,
    epsilon: Annotated[
        str | None,
        typer.Option(
            "--epsilon",
            metavar="RADIUS",
            help="l-inf radius of the attacks in [0, 1] pixels, such as 8/255; short for "
            "--set threat.epsilon=RADIUS.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a field of the recipe; repeatable."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Read the data and print all that would be done; write and train nothing.",
        ),
    ] = False,
    devices: Annotated[int, typer.Option("--devices", min=1, help="Processes or GPUs.")] = 1,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Train a model adversarially by a recipe, or on a folder of your own."""
    short = {"epochs": epochs, "seed": seed, "model.image_size": image_size}
    changes = with_short({**short, "threat.epsilon": epsilon}, settings or ())
    use_threads(threads, processes=devices)
    with session(as_json) as ui:
        from advmoe_deploy import api
        from advmoe_deploy.cli.tables import training as training_tables

        if dry_run:
            _show_plan(ui, recipe, out, data, changes, devices, start)
            return
        report = api.train(
            recipe,
            out,
            data=data,
            settings=changes,
            resume=resume,
            overwrite=overwrite,
            devices=devices,
            start=start,
            progress=ui.progress,
        )
        if os.environ.get("RANK", "0") == "0":  # torchrun starts one such process per device
            ui.show(report.model_dump(mode="json"), lambda: training_tables.train_report(report))


def _show_plan(
    ui: Session,
    recipe: str,
    out: Path | None,
    data: str | None,
    changes: list[str],
    devices: int,
    start: str | None,
) -> None:
    from advmoe_deploy.cli.tables import settings as tables
    from advmoe_deploy.train.plan import plan_of
    from advmoe_deploy.train.request import train_request
    from advmoe_deploy.zoo.resolve import resolve

    # A folder that holds a run is none of the plan's business: nothing is written.
    asked = train_request(
        recipe,
        out,
        data=data,
        settings=changes,
        devices=devices,
        overwrite=True,
        start=(start, resolve(start)) if start else None,
    )
    plan = plan_of(asked)
    ui.show(plan.report(), lambda: tables.run_plan(plan))

"""The command ``train``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advmoe_deploy.cli.completion import recipes
from advmoe_deploy.cli.options import Data, Json, Overwrite, Threads, use_torch_threads, with_short
from advmoe_deploy.cli.session import Session, session, this_command
from advmoe_deploy.errors import UsageError
from advmoe_deploy.process import use_threads

if TYPE_CHECKING:
    from advmoe_deploy.train.request import TrainRequest


def train(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            autocompletion=recipes,
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
    """Train a robust model by a recipe, or on your own images."""
    if context.args:
        raise UsageError(
            f"train takes one recipe, and nothing behind it, such as '{context.args[0]}'; a folder "
            "of images is named by --data FOLDER"
        )
    short = {"epochs": epochs, "seed": seed, "model.image_size": image_size}
    changes = with_short({**short, "threat.epsilon": epsilon}, settings or ())
    use_threads(threads, processes=devices)
    with session(as_json, loads=True) as ui:
        from advmoe_deploy.train.device import require_torch
        from advmoe_deploy.train.request import train_request
        from advmoe_deploy.zoo.resolve import resolve

        if not dry_run:
            require_torch()
        asked = train_request(
            recipe,
            out,
            data=data,
            settings=changes,
            devices=devices,
            resume=resume,
            overwrite=overwrite,
            start=(start, resolve(start)) if start else None,
        )
        if dry_run:
            _show_plan(ui, asked)
            return
        use_torch_threads(threads, processes=devices)

        from advmoe_deploy.cli.tables import training as training_tables
        from advmoe_deploy.train.run.folder import CHECKPOINTS
        from advmoe_deploy.train.run.loop import train_requested

        ui.resumable(
            "--resume",
            without=("--overwrite",),
            has_state=lambda: (asked.out / CHECKPOINTS).is_dir(),
        )
        report = train_requested(asked, ui.progress)
        if os.environ.get("RANK", "0") == "0":  # torchrun starts one such process per device
            mended = (f"--set={setting}" for setting in report.remedies)
            again = this_command(*mended, "--overwrite", without=("--resume",))
            ui.show(
                report.model_dump(mode="json"),
                lambda: training_tables.train_report(report, again),
            )


def _show_plan(ui: Session, asked: "TrainRequest") -> None:
    from advmoe_deploy.cli.tables import settings as tables
    from advmoe_deploy.train.plan import plan_of

    plan = plan_of(asked)
    ui.show(plan.report(), lambda: tables.run_plan(plan))

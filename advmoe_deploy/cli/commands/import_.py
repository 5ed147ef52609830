"""The command ``import``, for checkpoints of the papers' released code."""

from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.cli.completion import data_sets
from advmoe_deploy.cli.options import Json, Overwrite, Threads, use_torch_threads
from advmoe_deploy.cli.session import session
from advmoe_deploy.errors import CheckpointError, unknown_name
from advmoe_deploy.families import IMPORT_SOURCES
from advmoe_deploy.process import use_threads
from advmoe_deploy.settings import epsilon_of, parse_settings


def import_checkpoint(
    file: Annotated[
        Path, typer.Argument(readable=False, metavar="FILE", help="By torch.save or safetensors.")
    ],
    source: Annotated[
        str, typer.Option("--from", help="Whose code wrote it: advmoe, robust-experts, dual-model.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="What shapes cannot tell: image_size, mean, std, top_k, alpha...; repeatable.",
        ),
    ] = None,
    key: Annotated[
        str,
        typer.Option(
            "--key",
            help="Where in FILE the network is, if it holds several: --key state_dict_ema, or "
            "--key ema_model of the names that begin so; '.' for the top.",
        ),
    ] = "",
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            metavar="FILE|CAT,DOG,...",
            help="Names of the classes in the order of the outputs, in a file one a line; by "
            "default those of --data.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FOLDER|NAME[:PATH]",
            autocompletion=data_sets,
            help="What it was trained on, for 'export' and 'verify' to know.",
        ),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            "--epsilon",
            metavar="RADIUS",
            parser=epsilon_of,
            help="l-inf radius in [0, 1] pixels that it was trained for, such as 8/255.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", readable=False, help="Run directory; by default runs/ and FILE's name."
        ),
    ] = None,
    overwrite: Overwrite = False,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Import a checkpoint of the papers' released code as a run.

    'advmoe export' takes it as it takes what was trained here.
    """
    run = out or Path("runs") / file.stem
    use_threads(threads)
    with session(as_json, loads=True) as ui:
        from advmoe_deploy.data.remembered import remembered

        if source not in IMPORT_SOURCES:
            raise unknown_name("source", source, IMPORT_SOURCES)
        parse_settings(settings or ())
        if not file.is_file():
            raise CheckpointError(f"{file} is no file; name a checkpoint")
        known = remembered(classes, data, epsilon, ui.progress.note)
        use_torch_threads(threads)
        from advmoe_deploy.cli.tables import training as training_tables
        from advmoe_deploy.models.macs import macs_of
        from advmoe_deploy.models.upstream.run import run_from_released

        checkpoint = run_from_released(
            file,
            source,
            run,
            settings=settings or (),
            key=key,
            overwrite=overwrite,
            describe=known.of,
        )
        value = {
            "run": str(run),
            "model": checkpoint.model.model_dump(mode="json"),
            "class_names": checkpoint.class_names,
            "threat": checkpoint.threat and checkpoint.threat.model_dump(mode="json"),
            "macs": macs_of(checkpoint.model).model_dump(mode="json"),
            **checkpoint.provenance,
        }
        ui.show(value, lambda: training_tables.import_report(value))

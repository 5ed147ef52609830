"""The command ``add``."""

from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.cli.completion import named_models
from advmoe_deploy.cli.options import NAMED, Data, Json, License, Overwrite, Results
from advmoe_deploy.cli.session import session


def add(
    run: Annotated[
        Path,
        typer.Argument(
            readable=False,
            metavar="RUN",
            autocompletion=named_models,
            help=f"What 'advmoe train' wrote{NAMED}",
        ),
    ],
    name: Annotated[str, typer.Option("--name", help="What zoo:NAME will find it by.")],
    results: Results = None,
    half: Annotated[
        bool, typer.Option("--fp16", help="Round the weights to fp16; what it does is measured.")
    ] = False,
    data: Data = None,
    license_: License = "",
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            readable=False,
            metavar="FOLDER",
            help="To hand it on: without the path of its data. By default your own models, "
            "$ADVMOE_ZOO.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Put a run's model under a name, for zoo:NAME.

    Its weights, what was measured, and a model card.
    """
    with session(as_json) as ui:
        from advmoe_deploy.cli.tables import models as tables
        from advmoe_deploy.zoo.pack import Packing, pack_run
        from advmoe_deploy.zoo.places import own_folder
        from advmoe_deploy.zoo.resolve import resolve

        how = Packing(
            half=half,
            portable=to is not None,
            results=tuple(results or ()),
            data=data,
            licence=license_,
        )
        target = (to or own_folder()) / name
        record = pack_run(resolve(run), target, how, overwrite=overwrite)
        files = [file for file in target.rglob("*") if file.is_file()]
        value = {
            "name": name,
            "folder": str(target),
            "source": f"zoo:{name}" if to is None else str(target),
            "bytes": sum(file.stat().st_size for file in files),
            "rounding_says": record.rounding.sentence() if record.rounding else "",
            **record.model_dump(mode="json"),
        }
        ui.show(value, lambda: tables.added_model(value))

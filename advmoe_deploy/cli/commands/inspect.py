"""The command ``inspect``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from advmoe_deploy.cli.options import NAMED, Json
from advmoe_deploy.cli.session import session


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            readable=False, metavar="BUNDLE|RUN", help=f"What 'export' or 'train' wrote{NAMED}"
        ),
    ],
    as_json: Json = False,
) -> None:
    """Show what a bundle or a run holds; every hash is checked."""
    with session(as_json) as ui:
        from advmoe_deploy.bundle import open_bundle
        from advmoe_deploy.cli.tables import bundle as tables
        from advmoe_deploy.cli.tables import models as model_tables
        from advmoe_deploy.zoo.places import RUN_MARKER
        from advmoe_deploy.zoo.resolve import resolve

        found = resolve(path)
        if (found / RUN_MARKER).is_file():
            value = _of_run(path, found)
            ui.show(value, lambda: model_tables.run_contents(value))
            return
        opened = open_bundle(found)
        value = {"bundle": str(opened.path), **opened.manifest.model_dump(mode="json")}
        ui.show(value, lambda: tables.bundle_contents(opened))


def _of_run(source: Path, run: Path) -> dict[str, Any]:
    from advmoe_deploy.models.checkpoint import WEIGHTS, load_checkpoint
    from advmoe_deploy.zoo.record import read_record

    checkpoint, record = load_checkpoint(run / "model")[0], read_record(run)
    return {
        "run": str(run),
        "source": str(source),
        "bytes": (run / "model" / WEIGHTS).stat().st_size,
        **checkpoint.model_dump(mode="json"),
        "record": record and record.model_dump(mode="json"),
    }

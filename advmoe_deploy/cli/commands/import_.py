"""The command that brings in what the papers' released code wrote: import."""

from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.cli.options import Json, Overwrite
from advmoe_deploy.cli.session import session
from advmoe_deploy.files import refuse_existing, sha256_of, staged_directory

# What tells a run that may be replaced from a folder that is none.
_MARKER = "model/checkpoint.json"


def import_checkpoint(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="By torch.save or safetensors.")],
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
    out: Annotated[
        Path | None, typer.Option("--out", help="Run directory; by default runs/ and FILE's name.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Import a checkpoint of the papers' released code as a run that 'advmoe export' takes."""
    run = out or Path("runs") / file.stem
    refuse_existing(run, overwrite=overwrite, marker=_MARKER)
    with session(as_json) as ui:
        from advmoe_deploy.cli.tables import training as training_tables
        from advmoe_deploy.models.checkpoint import Checkpoint, save_checkpoint
        from advmoe_deploy.models.macs import macs_of
        from advmoe_deploy.models.upstream import importer as upstream

        overrides = upstream.parse_settings(settings or ())
        imported = upstream.read_released(file, source, overrides, key)
        spec = imported.spec
        provenance = {
            "imported_from": source,
            "file": file.name,
            "file_sha256": sha256_of(file),
            **imported.report(),
        }
        checkpoint = Checkpoint(
            model=spec,
            threat=None,
            class_names=tuple(str(label) for label in range(spec.num_classes)),
            recipe={"name": f"imported from {source}", "settings": overrides},
            metrics={},
            provenance=provenance,
        )
        value = {
            "run": str(run),
            "model": spec.model_dump(mode="json"),
            "macs": macs_of(spec).model_dump(mode="json"),
            **provenance,
        }
        with staged_directory(run, overwrite=overwrite) as staged:
            (staged / "model").mkdir()
            save_checkpoint(staged / "model", checkpoint, imported.model)
        ui.show(value, lambda: training_tables.import_report(value))

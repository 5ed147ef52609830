"""The command ``push``."""

from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.cli.completion import named_models
from advmoe_deploy.cli.options import NAMED, Json, License, Overwrite, Results
from advmoe_deploy.cli.session import session
from advmoe_deploy.errors import UsageError


def push(
    path: Annotated[
        Path,
        typer.Argument(
            readable=False,
            metavar="RUN|BUNDLE",
            autocompletion=named_models,
            help=f"What 'train' or 'export' wrote{NAMED}",
        ),
    ],
    to: Annotated[str, typer.Option("--to", metavar="USER/NAME", help="The repository.")],
    private: Annotated[
        bool, typer.Option("--private", help="Only you and those you invite may read it.")
    ] = False,
    results: Results = None,
    license_: License = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Upload nothing: write it to --out and print it.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", readable=False, help="Of --dry-run; by default ./NAME-upload."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Upload a run's model or a bundle to the Hugging Face hub."""
    if not dry_run and (out is not None or overwrite):
        raise UsageError("--out and --overwrite go with --dry-run; a push replaces what was pushed")
    from advmoe_deploy.zoo.download import repository_of
    from advmoe_deploy.zoo.publish import README, refuse_upload

    repository = repository_of(to.removeprefix("hub:"))
    if repository.revision:
        raise UsageError(f"--to {to}: a push goes to the main branch; leave @ out")
    name = repository.name.partition("/")[2]
    target = out or Path(f"{name}-upload")
    if dry_run:
        refuse_upload(target, overwrite=overwrite)
    with session(as_json) as ui:
        from advmoe_deploy.cli.tables import models as tables
        from advmoe_deploy.zoo.pack import Packing
        from advmoe_deploy.zoo.resolve import resolve
        from advmoe_deploy.zoo.upload import push, upload_of, write_upload

        how = Packing(results=tuple(results or ()), licence=license_)
        upload = upload_of(resolve(path), name, how)
        value = {
            "kind": upload.kind,
            "repository": repository.name,
            "files": sorted(upload.files),
            "bytes": upload.bytes,
        }
        if dry_run:
            write_upload(upload, target, overwrite=overwrite)
            value |= {"out": str(target), "readme": (target / README).read_text(encoding="utf-8")}
        else:
            value["commit"] = push(upload, repository, private=private)
        ui.show(value, lambda: tables.pushed(value))

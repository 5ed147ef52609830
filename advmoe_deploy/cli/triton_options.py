"""The options of ``export --format triton``, and its work."""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.cli.session import Session
from advmoe_deploy.errors import UsageError

FORMAT = "triton"


class Kind(str, Enum):
    """What the models of a repository run on."""

    cpu = "cpu"
    gpu = "gpu"


Mount = Annotated[
    str | None,
    typer.Option(
        "--mount",
        metavar="PATH",
        help="triton: where the server will see what is written, by default /models.",
    ),
]
Device = Annotated[
    Kind | None, typer.Option("--device", help="triton: what the models run on, by default cpu.")
]
MaxBatch = Annotated[
    int | None,
    typer.Option("--max-batch", min=1, help="triton: most images of a batch, by default 64."),
]


def write_triton(
    ui: Session,
    source: Path,
    out: Path | None,
    to: str,
    mount: str | None,
    device: Kind | None,
    max_batch: int | None,
    others: Mapping[str, object],
    *,
    overwrite: bool,
) -> bool:
    """Write the repository of a bundle; return whether ``to`` asks for that.

    Raises:
        UsageError: options are given that concern it alone, and another format, or ``others``.
    """
    if to != FORMAT:
        if {mount, device, max_batch} != {None}:
            raise UsageError(
                "--mount, --device and --max-batch go with --format triton; leave them out"
            )
        return False
    if given := [name for name, value in others.items() if value]:
        raise UsageError(f"{given[0]} does not go with --format triton; leave it out")
    from advmoe_deploy import api
    from advmoe_deploy.cli.tables import bundle as tables
    from advmoe_deploy.export.triton.repository import write_repository
    from advmoe_deploy.zoo.resolve import place_for

    bundle = api.open_bundle(source)
    beside = bundle.path.resolve().with_name(f"{bundle.path.resolve().name}-triton")
    out = out or place_for(source, bundle.path, "triton", beside)
    models = write_repository(
        bundle,
        out,
        mount=mount or "/models",
        device=(device or Kind.cpu).value,
        max_batch=max_batch or 64,
        overwrite=overwrite,
    )
    value = {"repository": str(out), "models": models}
    ui.show(value, lambda: tables.repository_report(out, models))
    return True

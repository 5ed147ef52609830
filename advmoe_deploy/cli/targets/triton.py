"""The options of ``export --format triton``, and its work."""

from enum import Enum
from typing import Annotated

import typer

from advmoe_deploy.cli.session import Session
from advmoe_deploy.cli.targets.source import Source


class DeviceKind(str, Enum):
    """Runtime of the models of a repository."""

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
    DeviceKind | None,
    typer.Option("--device", help="triton: what the models run on, by default cpu."),
]
MaxBatch = Annotated[
    int | None,
    typer.Option("--max-batch", min=1, help="triton: most images of a batch, by default 64."),
]


def write(
    ui: Session,
    source: Source,
    *,
    mount: str = "/models",
    device: DeviceKind = DeviceKind.cpu,
    max_batch: int = 64,
) -> None:
    """Write the repository of a bundle and say what is in it."""
    from advmoe_deploy.cli.tables import bundle as tables
    from advmoe_deploy.export.triton.repository import write_repository

    bundle = source.opened()
    out = source.place(bundle, "triton")
    models = write_repository(
        bundle,
        out,
        mount=mount,
        device=device.value,
        max_batch=max_batch,
        overwrite=source.overwrite,
    )
    ui.show(
        {"repository": str(out), "models": models}, lambda: tables.repository_report(out, models)
    )

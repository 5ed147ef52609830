"""The options of ``export --format kserve``, and its work."""

from enum import Enum
from typing import Annotated

import typer

from advmoe_deploy.cli.session import Session
from advmoe_deploy.cli.targets.source import Source
from advmoe_deploy.errors import UsageError


class ServerKind(str, Enum):
    """Server in a pod."""

    advmoe = "advmoe"
    triton = "triton"


StorageUri = Annotated[
    str | None,
    typer.Option(
        "--storage-uri",
        metavar="URI",
        help="kserve: where pods fetch the bundle, such as s3://BUCKET/PATH or pvc://CLAIM/PATH; "
        "with --server triton, the repository.",
    ),
]
Image = Annotated[
    str | None,
    typer.Option(
        "--image",
        metavar="NAME:TAG",
        help="kserve: the server's image, such as what deploy/Dockerfile makes.",
    ),
]
Server = Annotated[
    ServerKind | None,
    typer.Option(
        "--server", help="kserve: what serves, by default advmoe; or triton, NVIDIA's server."
    ),
]


def write(
    ui: Session,
    source: Source,
    *,
    storage_uri: str | None = None,
    image: str | None = None,
    server: ServerKind = ServerKind.advmoe,
) -> None:
    """Write the manifests of a bundle and say how a cluster is given them.

    Raises:
        UsageError: an option is missing.
    """
    if storage_uri is None or image is None:
        raise UsageError("--format kserve needs --storage-uri and --image; its help has examples")
    from advmoe_deploy.cli.tables import bundle as tables
    from advmoe_deploy.export.kserve.manifests import kubernetes_name, write_manifests
    from advmoe_deploy.zoo.resolve import name_of

    bundle = source.opened()
    name, out = kubernetes_name(name_of(source.path)), source.place(bundle, "kserve.yaml")
    write_manifests(
        bundle,
        out,
        name=name,
        storage_uri=storage_uri,
        image=image,
        runtime=server.value,
        overwrite=source.overwrite,
    )
    value = {"manifests": str(out), "name": name, "bundle": bundle.identity}
    ui.show(value, lambda: tables.manifests_report(out, name, bundle))

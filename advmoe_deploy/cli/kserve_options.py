"""The options of ``export --format kserve``, and its work."""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.cli.session import Session
from advmoe_deploy.errors import UsageError

FORMAT = "kserve"


class Kind(str, Enum):
    """What serves in a pod."""

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
    Kind | None,
    typer.Option(
        "--server", help="kserve: what serves, by default advmoe; or triton, NVIDIA's server."
    ),
]


def write_kserve(
    ui: Session,
    source: Path,
    out: Path | None,
    to: str,
    storage_uri: str | None,
    image: str | None,
    server: Kind | None,
    others: Mapping[str, object],
    *,
    overwrite: bool,
) -> bool:
    """Write the manifests of a bundle; return whether ``to`` asks for that.

    Raises:
        UsageError: options are given that concern it alone, and another format, or ``others``; or
            one is missing.
    """
    if to != FORMAT:
        if {storage_uri, image, server} != {None}:
            raise UsageError(
                "--storage-uri, --image and --server go with --format kserve; leave them out"
            )
        return False
    if given := [name for name, value in others.items() if value]:
        raise UsageError(f"{given[0]} does not go with --format kserve; leave it out")
    if storage_uri is None or image is None:
        raise UsageError("--format kserve needs --storage-uri and --image; its help has examples")
    from advmoe_deploy import api
    from advmoe_deploy.cli.tables import bundle as tables
    from advmoe_deploy.export.kserve.manifests import kubernetes_name, write_manifests
    from advmoe_deploy.zoo.resolve import name_of, place_for

    bundle = api.open_bundle(source)
    name = kubernetes_name(name_of(source))
    place = bundle.path.resolve()
    beside = place.with_name(f"{place.name}-kserve.yaml")
    out = out or place_for(source, bundle.path, "kserve.yaml", beside)
    write_manifests(
        bundle,
        out,
        name=name,
        storage_uri=storage_uri,
        image=image,
        runtime=(server or Kind.advmoe).value,
        overwrite=overwrite,
    )
    value = {"manifests": str(out), "name": name, "bundle": bundle.identity}
    ui.show(value, lambda: tables.manifests_report(out, name, bundle))
    return True

"""The options of ``export --format web``, and its work."""

from pathlib import Path
from typing import Annotated, Any

import typer

from advmoe_deploy.cli.session import Session
from advmoe_deploy.cli.targets.source import Source
from advmoe_deploy.settings import epsilon_of

_IMAGES = 20

Images = Annotated[
    int | None,
    typer.Option(
        "--images",
        min=1,
        max=1000,
        help=f"web: test images that go with the page, by default {_IMAGES}.",
    ),
]
Epsilon = Annotated[
    float | None,
    typer.Option(
        "--epsilon",
        metavar="RADIUS",
        parser=epsilon_of,
        help="web: l-inf radius of its attacks, such as 8/255; by default the one trained for.",
    ),
]
Runtime = Annotated[
    Path | None,
    typer.Option(
        "--runtime",
        readable=False,
        metavar="TARBALL|FOLDER",
        help="web: npm's package onnxruntime-web, where npm is not to fetch it.",
    ),
]


def write(
    ui: Session,
    source: Source,
    *,
    data: str | None = None,
    class_map: str | None = None,
    **own: Any,
) -> None:
    """Write the page of a bundle and say how to look at it."""
    from advmoe_deploy.cli.tables import bundle as tables
    from advmoe_deploy.data.matching import read_class_map
    from advmoe_deploy.export.web.site import write_site

    bundle = source.opened()
    site = write_site(
        bundle,
        source.place(bundle, "web"),
        data=data,
        class_map=read_class_map(class_map),
        overwrite=source.overwrite,
        progress=ui.progress,
        **own,
    )
    value = {"site": str(site.path), "bytes": dict(site.sizes), **site.facts}
    ui.show(value, lambda: tables.site_report(site.path, site.facts, site.sizes))

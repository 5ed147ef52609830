"""The options of ``export --format web``, and its work."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from advmoe_deploy.cli.session import Session
from advmoe_deploy.errors import UsageError

FORMAT = "web"
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
        "--epsilon", help="web: l-inf radius of its attacks, by default the one trained for."
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


def write_web(
    ui: Session,
    source: Path,
    out: Path | None,
    to: str,
    data: str | None,
    class_map: str | None,
    own: Mapping[str, Any],
    others: Mapping[str, object],
    *,
    overwrite: bool,
) -> bool:
    """Write the page of a bundle; return whether ``to`` asks for that.

    Raises:
        UsageError: ``own`` options are given with another format, or ``others`` with this one.
    """
    if to != FORMAT:
        if any(value is not None for value in own.values()):
            raise UsageError(f"{', '.join(own)} go with --format {FORMAT}; leave them out")
        return False
    if given := [name for name, value in others.items() if value]:
        raise UsageError(f"{given[0]} does not go with --format {FORMAT}; leave it out")
    from advmoe_deploy import api
    from advmoe_deploy.cli.tables import bundle as tables
    from advmoe_deploy.data.matching import read_class_map
    from advmoe_deploy.export.web.site import write_site
    from advmoe_deploy.zoo.resolve import place_for

    bundle = api.open_bundle(source)
    beside = bundle.path.resolve().with_name(f"{bundle.path.resolve().name}-web")
    site = write_site(
        bundle,
        out or place_for(source, bundle.path, "web", beside),
        data=data,
        class_map=read_class_map(class_map),
        overwrite=overwrite,
        progress=ui.progress,
        **{name.removeprefix("--"): value for name, value in own.items() if value is not None},
    )
    value = {"site": str(site.path), "bytes": dict(site.sizes), **site.facts}
    ui.show(value, lambda: tables.site_report(site.path, site.facts, site.sizes))
    return True

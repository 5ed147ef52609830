"""The choice among the formats that are made of a bundle."""

from collections.abc import Callable, Mapping
from typing import Any

from advmoe_deploy.bundle import FORMATS
from advmoe_deploy.cli.session import Session
from advmoe_deploy.cli.targets import kserve, triton, web
from advmoe_deploy.cli.targets.source import Source
from advmoe_deploy.errors import UsageError, unknown_name

_WRITERS: dict[str, Callable[..., None]] = {
    "triton": triton.write,
    "web": web.write,
    "kserve": kserve.write,
}
_TAKEN = {"web": ("--data", "--class-map")}  # of the options that other formats have, too
Options = dict[str, Any]  # flag: value, or None where it is not given


def write_target(
    ui: Session, to: str, source: Source, own: Mapping[str, Options], others: Options
) -> bool:
    """Write the format ``to`` of a bundle, and return whether it is one that is made of bundles.

    ``own`` are the options of each such format, by format; ``others`` are the rest.

    Raises:
        UsageError: no format has that name, or options are given that do not go with it.
    """
    for name, options in own.items():
        given = [flag for flag, value in options.items() if value is not None]
        if given and name != to:
            raise UsageError(f"{given[0]} goes with --format {name} alone; leave it out")
    if to in FORMATS.values():
        return False
    if to not in _WRITERS:
        raise unknown_name("format", to, [*FORMATS.values(), *_WRITERS])
    taken = {flag: others[flag] for flag in _TAKEN.get(to, ())}
    if given := [flag for flag, value in others.items() if value and flag not in taken]:
        raise UsageError(f"{given[0]} does not go with --format {to}; leave it out")
    named = {flag.removeprefix("--").replace("-", "_"): v for flag, v in (own[to] | taken).items()}
    _WRITERS[to](ui, source, **{name: value for name, value in named.items() if value is not None})
    return True

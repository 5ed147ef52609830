"""Offers of a server: bundles, with the names and versions they get."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.serving.online.protocol import VERSION, ServedModel

_NAMED = re.compile(r"(?P<name>[^/\\:=]+)(?::(?P<version>[^/\\:=]*))?=(?P<place>.*)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Offer:
    """A bundle, its name (that of its model family by default) and its version, a number.

    ``again`` opens what lies at the bundle's place later; by default the bundle at its path.
    """

    bundle: Bundle
    name: str | None = None
    version: str = VERSION
    again: Callable[[], Bundle] | None = None

    def reopen(self) -> Bundle:
        """Return the bundle at the same place, as it is now.

        Raises:
            InputError: it is missing or damaged.
        """
        return open_bundle(self.bundle.path) if self.again is None else self.again()


def require_apart(models: Sequence[ServedModel]) -> None:
    """Raise :class:`UsageError` if two of ``models`` have name and version in common."""
    seen = set[tuple[str, str]]()
    for model in models:
        if (model.name, model.version) in seen:
            raise UsageError(
                f"two bundles are '{model.name}' version {model.version}; "
                "tell them apart by NAME=BUNDLE or NAME:VERSION=BUNDLE"
            )
        seen.add((model.name, model.version))


def split_offer(text: str) -> tuple[str | None, str, str]:
    """Return name, version and place of ``BUNDLE``, ``NAME=BUNDLE`` or ``NAME:VERSION=BUNDLE``.

    Raises:
        UsageError: the name or version cannot be part of an address, or there is no bundle.
    """
    found = _NAMED.fullmatch(text)
    if not text:
        raise UsageError("'' names no bundle; write BUNDLE or NAME=BUNDLE")
    if found is None:
        return None, VERSION, text
    name, version, place = found["name"], found["version"], found["place"]
    if not _NAME.fullmatch(name):
        raise UsageError(f"name '{name}' is none of letters, digits, '.', '_' and '-'; change it")
    if name == "stats":
        raise UsageError("/v2/models/stats has the statistics of all models; choose another name")
    if version is not None and not _VERSION.fullmatch(version):
        raise UsageError(f"version '{version}' of '{name}' is no number from 1 on; change it")
    if not place:
        raise UsageError(f"'{text}' names no bundle; write NAME=BUNDLE")
    return name, version or VERSION, place

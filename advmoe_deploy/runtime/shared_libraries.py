"""Shared libraries in wheels, wherever these lie, and on the system."""

import ctypes
from importlib.util import find_spec
from pathlib import Path


def load_library(name: str, package: str) -> bool:
    """Load a library from a package's folder, or from where the system looks; say whether it is.

    A later request by its name gets it.
    """
    places = [str(folder / name) for folder in package_folders(package)]
    return any(map(_is_loadable, [*places, name]))


def package_folders(package: str) -> list[Path]:
    """Return where a package lies, all places of one without code; it is not imported."""
    spec = find_spec(package)
    return [Path(root) for root in spec.submodule_search_locations or ()] if spec else []


def _is_loadable(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True

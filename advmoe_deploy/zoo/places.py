"""Places of models that have a name: this package's folder, and a folder of the user's own.

A model there is a folder NAME laid out as a run, or as a bundle.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from advmoe_deploy.bundle import MANIFEST
from advmoe_deploy.errors import UsageError, nearest
from advmoe_deploy.files import at_home

Source = Literal["packaged", "own"]

ZOO_VARIABLE = "ADVMOE_ZOO"
RUN_MARKER = "model/checkpoint.json"
PACKAGED = Path(__file__).parent / "models"
_LIST = "'advmoe list models' names them"


def own_folder() -> Path:
    """Return the folder of the user's own models; it need not exist.

    ``$ADVMOE_ZOO``, else ``models`` in our folder of the user's data: below ``$XDG_DATA_HOME`` or
    ``~/.local/share``, on macOS below ``~/Library/Application Support``.

    Source: XDG Base Directory Specification 0.8; Apple's File System Programming Guide.

    Raises:
        UsageError: nothing names it, as in a container whose user has no home.
    """
    if named := os.environ.get(ZOO_VARIABLE):
        return at_home(named)
    data = os.environ.get("XDG_DATA_HOME")
    if not data:
        usual = "Library/Application Support" if sys.platform == "darwin" else ".local/share"
        try:
            data = str(Path.home() / usual)
        except RuntimeError:
            raise UsageError(
                f"this user has no home folder for models of their own; set {ZOO_VARIABLE} to one"
            ) from None
    return Path(data) / "advmoe-deploy" / "models"


def places() -> dict[Source, Path]:
    """Return the folders that hold models, the one that is asked first in front.

    A home that nothing names, or that is another user's, as in some containers, holds none.
    """
    try:
        own = own_folder()
        if not os.environ.get(ZOO_VARIABLE):
            own.is_dir()  # which raises where the way there is closed
    except (UsageError, PermissionError):
        return {"packaged": PACKAGED}
    return {"own": own, "packaged": PACKAGED}


def is_model(folder: Path) -> bool:
    """Return whether ``folder`` is laid out as a run with a model, or as a bundle."""
    return (folder / RUN_MARKER).is_file() or (folder / MANIFEST).is_file()


def models() -> Iterator[tuple[str, Source, Path]]:
    """Yield name, source and folder of every model, in order of names within a source.

    A folder that may not be looked into is among them.
    """
    for source, place in places().items():
        folders = sorted(place.iterdir()) if place.is_dir() else []
        for folder in folders:
            if _may_be_model(folder) and not folder.name.startswith("."):
                yield folder.name, source, folder


def _may_be_model(folder: Path) -> bool:
    try:
        return is_model(folder)
    except OSError:  # it may not be looked into
        return True


def names() -> set[str]:
    """Return the names of all models."""
    return {name for name, _, _ in models()}


def find(name: str) -> Path | None:
    """Return the folder of the model called ``name``; the user's own comes before a packaged one.

    ``None`` if no model is called so.
    """
    if not is_plain(name):
        return None
    return next((p / name for p in places().values() if is_model(p / name)), None)


def is_plain(name: str) -> bool:
    """Return whether ``name`` is that of a folder, and leads nowhere else."""
    return bool(name) and Path(name).name == name and not name.startswith(".")


def unknown_model(name: str) -> UsageError:
    """Return the error that no model is called ``name``, with the nearest names."""
    likely = nearest(name, names())
    hint = f"did you mean {', '.join(likely)}? " if likely else ""
    return UsageError(f"unknown model '{name}'; {hint}{_LIST}")

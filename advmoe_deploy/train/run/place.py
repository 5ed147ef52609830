"""Place of a run: whether a folder may become one, known without loading anything heavy."""

from pathlib import Path

from advmoe_deploy.errors import UsageError

CONFIG = "config.json"


def require_place(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder in which no run can begin, or none go on.

    Raises:
        UsageError: it is no run, or holds one and nothing says what to do with it.
    """
    if resume and not is_occupied(path):
        raise UsageError(f"{path} holds no run to resume; leave --resume out")
    if resume or not is_occupied(path):
        return
    if not (path / CONFIG).is_file():
        raise UsageError(f"{path} exists and is no run; choose another --out")
    if not overwrite:
        raise UsageError(f"{path} holds a run; pass --resume to go on, or choose another --out")


def is_occupied(path: Path) -> bool:
    """Return whether something is at ``path`` besides an empty folder."""
    return path.is_file() or (path.is_dir() and any(path.iterdir()))

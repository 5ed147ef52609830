"""Place of a run: whether a folder may become one, known without loading anything heavy."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from advmoe_deploy.data.notices import say_once
from advmoe_deploy.data.registry import absolute
from advmoe_deploy.errors import CheckpointError, UsageError, one_line
from advmoe_deploy.specs import Frozen
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.run.data import DATA, RunData, require_same_content

CONFIG = "config.json"
REPORT = "report.json"


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
        finished = (path / REPORT).is_file()
        kind = "a finished run" if finished else "a run that did not end"
        go_on = "" if finished else "--resume to go on with it, "
        raise UsageError(
            f"{path} holds {kind}; pass {go_on}--overwrite to replace it, or choose another --out"
        )


def is_occupied(path: Path) -> bool:
    """Return whether something is at ``path`` besides an empty folder.

    What is left of a run that was killed before it had begun is nothing.
    """
    return path.is_file() or (path.is_dir() and any(map(_is_kept, path.iterdir())))


def _is_kept(entry: Path) -> bool:
    return not entry.name.startswith(tuple(f".{name}.partial-" for name in (CONFIG, DATA)))


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold the folder of a run, made if need be, against other processes of this machine.

    Raises:
        UsageError: another one trains there.
    """
    path.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":  # without locks of POSIX
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another process trains in {path}; stop it, or choose another --out"
            ) from None
        except OSError:  # file systems of a network may lock no folders
            say_once(f"{path} cannot be locked; see that no other process trains there")
        yield
    finally:
        os.close(descriptor)


def require_same(path: Path, config: TrainConfig, data: RunData) -> None:
    """Refuse the run at ``path`` if it was trained by another configuration or on other data.

    Raises:
        UsageError: it was.
        CheckpointError: its configuration is missing or cannot be read.
    """
    file = path / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{path} holds no {CONFIG}; name what 'advmoe train' wrote")
    before = _validated(TrainConfig, file)
    kept = _validated(RunData, path / DATA) if (path / DATA).is_file() else None
    # Why, not what; and of the model that it began with its weights tell, wherever they lie now.
    told: Any = {"chosen": True, "start": {"source", "path"}}
    ours, theirs = (each.model_dump(mode="json", exclude=told) for each in (config, before))
    if kept and kept.fingerprint and data.fingerprint:
        require_same_content(path, kept, data)
        ours["data"] = theirs["data"]
    elif data.source in (before.data, absolute(before.data)):
        ours["data"] = theirs["data"]
    changed = [f"{key}={_as_set(theirs[key])}" for key in ours if ours[key] != theirs[key]]
    if changed:
        raise UsageError(
            f"{path} was trained with {', '.join(changed)}; "
            "resume with the same settings, or choose another --out"
        )


def _as_set(value: object) -> str:
    """Return ``value`` as ``--set`` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


_Value = TypeVar("_Value", bound=Frozen)


def _validated(kind: type[_Value], file: Path) -> _Value:
    try:
        return kind.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{file}: {one_line(error)}; train again") from None

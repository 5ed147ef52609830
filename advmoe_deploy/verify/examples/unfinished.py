"""State of an unfinished verification, kept after each attack, so that a killed one goes on.

Attacks are seeded, and each gets the images that stand, so the rest ends as it would have: on the
same machine with as many threads, image by image. Nothing in the file is pickled.

Shapes: N images, C channels, H height, W width.
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import DataError, UsageError, reading
from advmoe_deploy.files import is_stream, write_output
from advmoe_deploy.reports.versions import installed_versions
from advmoe_deploy.specs import AttackSpec, Frozen, ThreatModel
from advmoe_deploy.verify.examples.stored import npz_arrays
from advmoe_deploy.verify.report import AttackOutcome, FoundOn
from advmoe_deploy.verify.trial import Trial


class Key(Frozen):
    """Key of a verification, which goes on only where all of it is the same; hashes are SHA-256."""

    bundle: str
    engine: str
    images: str
    threat: ThreatModel
    attacks: tuple[str, ...]
    versions: dict[str, str]


class _Progress(Frozen):
    key: Key
    outcomes: tuple[AttackOutcome, ...]


def key_of(
    bundle: Bundle, engine: str, trial: Trial, searches: Sequence[tuple[AttackSpec, FoundOn]]
) -> Key:
    """Return the key of the verification of ``bundle`` that ``trial`` is."""
    pixels = hashlib.sha256(np.ascontiguousarray(trial.x_NCHW).tobytes())
    pixels.update(trial.labels_N.tobytes())
    return Key(
        bundle=bundle.identity,
        engine=engine,
        images=pixels.hexdigest(),
        threat=trial.threat,
        attacks=tuple(f"{attack} on {found_on}" for attack, found_on in searches),
        versions=installed_versions(),
    )


def keep(path: Path, key: Key, trial: Trial) -> None:
    """Write the state of ``trial`` to ``path``, whole or not at all."""
    buffer = io.BytesIO()
    progress = _Progress(key=key, outcomes=tuple(trial.outcomes))
    arrays: dict[str, Any] = {**trial.state(), "progress": progress.model_dump_json()}
    np.savez_compressed(buffer, **arrays)
    write_output(path, buffer.getvalue())


def go_on(path: Path, key: Key, trial: Trial) -> int:
    """Bring ``trial`` to where ``path`` left it and return how many attacks that were.

    Where there is no such file nothing was done yet.

    Raises:
        UsageError: a pipe or a device is there, which gives back nothing that was written.
        DataError: it is damaged, or of another verification.
    """
    if not path.exists():
        return 0
    if is_stream(path) and not path.is_dir():
        raise UsageError(f"{path} is no file that a state can be read from again; name another")
    state = _read(path)
    try:
        progress = _Progress.model_validate_json(str(state.pop("progress")))
    except (KeyError, ValidationError):
        raise _damaged(path) from None
    for name, ours in key:
        if ours != getattr(progress.key, name):
            raise DataError(
                f"{path} is of a verification with other {name}; name another --resume file, or "
                "delete this one to begin anew"
            )
    try:
        trial.restore(state, progress.outcomes)
    except (KeyError, ValueError):
        raise _damaged(path) from None
    return len(progress.outcomes)


def _read(path: Path) -> dict[str, NDArray[np.generic]]:
    with reading(path):
        content = path.read_bytes()
    try:
        return npz_arrays(io.BytesIO(content))
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error):
        raise _damaged(path) from None


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is no state of a verification, or damaged; delete it to begin anew")

"""Runs and bundles of the Hugging Face hub, downloaded and checked before anything is loaded.

First comes what says which files there are, then these and no others. The client's cache holds
links, and a bundle may hold none: its files are linked anew, by hard links where the file system
can, in a folder of our own that bears the repository's name.
"""

import glob
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from advmoe_deploy.bundle import CARD, MANIFEST, MANIFEST_HASH, SIGNATURE
from advmoe_deploy.errors import BundleError, CheckpointError, InputError, MachineError, UsageError
from advmoe_deploy.files import sha256_of, staged_directory
from advmoe_deploy.hub.client import one_at_a_time, snapshot
from advmoe_deploy.hub.faults import FULL, Repository
from advmoe_deploy.process import cache_folder
from advmoe_deploy.zoo.places import RUN_MARKER
from advmoe_deploy.zoo.record import RECORD, read_fields

_WEIGHTS = "model/weights.safetensors"
# Kinds of files that an export writes; none of them runs code of its own in Python.
_SUFFIXES = {".onnx", ".safetensors", ".npz", ".json", ".md", ".engine", ".sh"}
_FORM = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def repository_of(text: str) -> Repository:
    """Return the repository that ``USER/NAME`` or ``USER/NAME@REVISION`` is.

    Raises:
        UsageError: it has another form.
    """
    found = _FORM.fullmatch(text)
    if not found or ".." in text:
        raise UsageError(f"'hub:{text}' is no repository; write hub:USER/NAME or ...@REVISION")
    return Repository(found["name"], found["revision"])


def download(text: str) -> Path:
    """Return a folder with the run or bundle of the repository ``text``, every hash checked.

    Raises:
        UsageError: ``text`` is no ``USER/NAME[@REVISION]``.
        InputError: there is no such repository, it may not be read, it holds nothing of ours, or
            a file is not what the repository itself says it is.
        MachineError: the hub cannot be reached, or the disk is full.
        BackendUnavailableError: the hub's client is not installed.
    """
    asked = repository_of(text)
    first = snapshot(asked, [MANIFEST, MANIFEST_HASH, RUN_MARKER])
    names = _files_of(asked, first)
    commit = Repository(asked.name, first.name)  # whatever is pushed meanwhile
    folder = snapshot(commit, [glob.escape(name) for name in names])
    _require_hashes(asked, folder)
    return _linked(asked, folder, [name for name in names if (folder / name).is_file()])


def _files_of(asked: Repository, folder: Path) -> list[str]:
    """Return the names of the files to download; those that may be absent are among them."""
    if (folder / MANIFEST).is_file():
        listed = read_fields(folder / MANIFEST).get("files")
        if not isinstance(listed, dict) or not all(isinstance(v, dict) for v in listed.values()):
            raise BundleError(f"{asked}: {MANIFEST} lists no files; ask its owner")
        for name in listed:
            _require_harmless(asked, name)
        return [MANIFEST, MANIFEST_HASH, SIGNATURE, *listed]
    if (folder / RUN_MARKER).is_file():
        return [RUN_MARKER, _WEIGHTS, RECORD, CARD]
    raise InputError(
        f"{asked} holds neither {RUN_MARKER} nor {MANIFEST}; name what 'advmoe push' wrote"
    )


def _require_harmless(asked: Repository, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.suffix not in _SUFFIXES:
        raise BundleError(f"{asked}: {MANIFEST} lists {name}, which no export writes; not used")


def _require_hashes(asked: Repository, folder: Path) -> None:
    """Check what the repository says of its files: a bundle's manifest, or a run's checkpoint."""
    kind: type[InputError] = BundleError if (folder / MANIFEST).is_file() else CheckpointError
    for name, expected in _hashes(folder).items():
        file = folder / name
        if not file.is_file():
            # Clients before 2.0 give without a network what the cache holds, whole or not.
            raise kind(
                f"{asked} is not whole, it lacks {name}; try again with a network, or ask its "
                "owner to push it again"
            )
        if sha256_of(file) != expected:
            raise kind(f"{asked}: {name} {_differs(file)}")


def _hashes(folder: Path) -> dict[str, object]:
    """Return the SHA-256 of each file that has to be there."""
    if not (folder / MANIFEST).is_file():
        return {_WEIGHTS: read_fields(folder / RUN_MARKER).get("weights_sha256")}
    records = read_fields(folder / MANIFEST)["files"].items()
    return {name: record.get("sha256") for name, record in records}


def _differs(file: Path) -> str:
    """Return who is to blame for a wrong hash: the client names large files by their SHA-256."""
    blob = file.resolve()
    damaged = _SHA256.fullmatch(blob.name) and sha256_of(blob) != blob.name
    way_out = f"delete {blob} and try again" if damaged else "ask its owner to push it again"
    where = "was damaged in the cache" if damaged else "is not what the repository says"
    return f"{where} (SHA-256 differs); {way_out}"


def _linked(asked: Repository, folder: Path, names: Sequence[str]) -> Path:
    """Return a folder called as the repository with links to the files of ``folder``."""
    user, _, name = asked.name.partition("/")
    target = _own_cache() / "hub" / user / folder.name / name

    def is_whole() -> bool:
        return all(_is_same(folder / each, target / each) for each in names)

    if not is_whole():
        with _room_for(target), one_at_a_time(target.with_name(f".{name}.lock")):
            if not is_whole():  # another process may have been there meanwhile, and reads it now
                _link_anew(folder, target, names)
    return target


def _own_cache() -> Path:
    try:
        return cache_folder()
    except RuntimeError:
        raise MachineError(
            "nothing says where the home is, and so our own cache; set XDG_CACHE_HOME to a folder"
        ) from None


def _link_anew(folder: Path, target: Path, names: Sequence[str]) -> None:
    with staged_directory(target, overwrite=True) as staged:
        for each in names:
            (staged / each).parent.mkdir(parents=True, exist_ok=True)
            _link((folder / each).resolve(), staged / each)


@contextmanager
def _room_for(target: Path) -> Iterator[None]:
    """Say of a full disk which it is: the error of a copy names the file that was copied first."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise MachineError(
            f"{target}: the disk of our own cache is full; free some space, or set XDG_CACHE_HOME "
            "to a folder on another disk"
        ) from error


def _is_same(file: Path, linked: Path) -> bool:
    """Return whether ``linked`` is ``file``, or a copy of its size and no younger than it."""
    if not linked.is_file():
        return False
    ours, theirs = linked.stat(), file.stat()
    same = os.path.samestat(ours, theirs)
    return same or (ours.st_size == theirs.st_size and ours.st_mtime >= theirs.st_mtime)


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(file, target)

"""Files that are whole or absent: hashes, atomic writes, staged directories."""

import hashlib
import itertools
import os
import platform
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from advmoe_deploy.errors import UsageError, naming, reading, writing

SUMS = "SHA256SUMS"
# In the names of all that this process writes under another name first.
_OURS, _numbers = uuid.uuid4().hex[:8], itertools.count()


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of the file at ``path``."""
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def at_home(path: str) -> Path:
    """Return ``path``, a leading ``~`` or ``~USER`` replaced if there is such a user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path's own raises


def names_file(text: str) -> bool:
    """Return whether there is a file called ``text``, which may be too long for a name."""
    with suppress(OSError):
        return Path(text).is_file()
    return False


def write_sums(root: Path) -> None:
    """Write ``root/SHA256SUMS``, of all files below it, for ``sha256sum --check``."""
    files = sorted(file for file in root.rglob("*") if file.is_file())
    lines = [f"{sha256_of(file)}  {file.relative_to(root).as_posix()}\n" for file in files]
    (root / SUMS).write_text("".join(lines), encoding="utf-8")


def write_output(path: Path, content: bytes) -> None:
    """Write ``content`` to a file that a user named, so that a reader sees the old or the new one.

    A link stays, and what it leads to is written. So does what is no regular file, such as a pipe
    or a device, which takes the content as it takes that of any other program.
    """
    if is_stream(path):
        with writing(path), path.open("ab") as stream:
            stream.write(content)
    else:
        write_atomically(path.resolve(), content)


def require_writable(path: Path) -> None:
    """Raise as :func:`write_output` would, before the work whose result ``path`` is to take.

    Nothing stays of the trial.

    Raises:
        UsageError: it is a folder.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name a file in it")
    if is_stream(path):
        return
    probe = _partial_name(path.resolve())
    with writing(path):
        made = [folder for folder in probe.parents if not folder.exists()]
        try:
            _write_to_disk(probe, b"")
        finally:
            with suppress(OSError):  # it could not be made, or somebody else's is in a folder
                probe.unlink(missing_ok=True)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()


def is_stream(path: Path) -> bool:
    """Return whether ``path`` takes what is written and cannot be replaced by a file.

    A pipe, a device, and a file that this process writes its messages to, as ``/dev/stdout`` is.
    """
    found = _found(path)
    return found is not None and (
        not stat.S_ISREG(found.st_mode)
        or any(os.path.samestat(found, messages) for messages in _messages())
    )


def _found(path: Path) -> os.stat_result | None:
    """Return what is to be replaced at ``path``; links that lead in a circle raise."""
    with writing(path):
        try:
            return path.stat()
        except FileNotFoundError:
            return None


def _messages() -> Iterator[os.stat_result]:
    for descriptor in (1, 2):
        with suppress(OSError):  # it is closed
            yield os.fstat(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the whole new one."""
    write_in_turn([(path, content)])


def write_in_turn(contents: Sequence[tuple[Path, bytes]]) -> None:
    """Write each content to its path, one after the other; a path may come more than once.

    All of them are on the disk under other names before the first takes its place, so that a full
    disk changes nothing. After a kill the first few are new, each of them whole.
    """
    staged = [(_partial_name(path), path, content) for path, content in contents]
    try:
        for partial, path, content in staged:
            with writing(path):
                _write_to_disk(partial, content)
        for partial, path, _ in staged:
            with writing(path):
                partial.replace(path)
    finally:
        for partial, _, _ in staged:
            if partial.exists():
                partial.unlink()


@contextmanager
def staged_file(target: Path) -> Iterator[BinaryIO]:
    """Yield a file for writing and reading that takes ``target``'s place when the block ends well.

    On any exception it is removed, and so is what a process that was killed left of one.
    """
    partial = _partial_name(target)
    try:
        with writing(target):
            remove_abandoned(target.parent, re.escape(target.name))
            with partial.open("x+b") as file:  # new, so that no link leads elsewhere
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _write_to_disk(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_to_disk(path: Path) -> None:
    """Wait until the file at ``path`` is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def staged_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden sibling of ``target`` that becomes ``target`` when the block ends well.

    Where ``target`` is a link, what it leads to is replaced. On any exception, Ctrl-C included, the
    staged files are removed and an older ``target`` is left as it was.

    Raises:
        UsageError: ``target`` exists and ``overwrite`` is false.
    """
    refuse_existing(target, overwrite=overwrite)
    target = target.resolve()
    partial = _partial_name(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent, re.escape(target.name))
        partial.mkdir()
    try:
        with naming(target):
            yield partial
        with writing(target):
            _replace_directory(partial, target, overwrite=overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(target: Path, *, overwrite: bool, marker: str | None = None) -> None:
    """Raise :class:`UsageError` if ``target`` is in the way and may not be replaced.

    With ``marker`` only a directory that holds a file of that name may be, and not the one we are
    in.
    """
    is_there = _found(target) is not None
    if marker and Path.cwd().is_relative_to(target.resolve()):
        raise UsageError(f"{target} holds the current directory; choose another target")
    if marker and is_there and not (target / marker).is_file():
        raise UsageError(
            f"{target} exists and holds no {marker}, so it is not replaced; choose another target"
        )
    if is_there and not overwrite:
        raise UsageError(f"{target} exists; pass --overwrite or choose another target")


def remove_abandoned(directory: Path, target: str = r".+") -> None:
    """Delete what processes of this host that were killed left half-written in ``directory``.

    A directory that stepped aside for a new one which never came steps back. ``target`` is a
    pattern for the names of what was being written.
    """
    if not directory.is_dir():
        return
    pattern = re.compile(rf"\.({target})\.partial-{re.escape(platform.node())}-(\d+)-\w+(\.old)?")
    for path in directory.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None or _is_in_use(path.name, int(match[2])):
            continue
        if match[3] and not (directory / match[1]).exists():
            path.rename(directory / match[1])  # killed between the two renames: it is all there is
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _partial_name(target: Path) -> Path:
    # The host is named because process ids mean nothing to another one on a shared volume.
    unique = f"{platform.node()}-{os.getpid()}-{_OURS}_{next(_numbers)}"
    return target.with_name(f".{target.name}.partial-{unique}")


def _replace_directory(partial: Path, target: Path, *, overwrite: bool) -> None:
    # A directory cannot be renamed over a full one, so the old one steps aside for an instant. What
    # has come since the start, and may not be replaced, is in the way.
    aside = target.with_name(f"{partial.name}.old")
    try:
        if overwrite and target.exists():
            target.rename(aside)
        partial.rename(target)
    finally:
        if aside.exists() and not target.exists():
            aside.rename(target)
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def _is_in_use(partial: str, pid: int) -> bool:
    """Return whether the process that made ``partial`` may still be writing it.

    In a container that is started again every process has the number of the one that was killed.
    """
    return f"-{pid}-{_OURS}_" in partial if pid == os.getpid() else _is_alive(pid)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

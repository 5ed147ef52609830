"""File tree below a data set's folder, hidden files apart."""

import errno
import os
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from advmoe_deploy.data.notices import say_once
from advmoe_deploy.errors import DataError, reason_of

# What operating systems, editors and network storage leave behind under a visible name.
_LEFT_BEHIND = frozenset(
    {
        "#recycle",
        "$RECYCLE.BIN",
        "@eaDir",
        "System Volume Information",
        "__MACOSX",
        "__pycache__",
        "lost+found",
    }
)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is nobody's data: ``.ipynb_checkpoints``..."""
    return name.startswith(".") or name in _LEFT_BEHIND


@dataclass(frozen=True)
class Tree:
    """Visible files and folders below ``root``, as relative POSIX paths in order of their parts."""

    root: Path
    files: tuple[str, ...]
    folders: tuple[str, ...]

    def subfolders(self, folder: str = "") -> tuple[str, ...]:
        """Return the names of the folders directly in ``folder``, by default in the root."""
        return tuple(PurePosixPath(f).name for f in self.folders if parent_of(f) == folder)

    def below(self, folder: str) -> tuple[str, ...]:
        """Return the files anywhere below ``folder``."""
        # In order of their parts these are neighbours; no name has a NUL, the next one after it.
        parts = folder.split("/")
        ends = (parts, [*parts[:-1], f"{parts[-1]}\0"])
        first, last = (bisect_left(self.files, end, key=_parts_of) for end in ends)
        return self.files[first:last]

    def files_in(self, folder: str = "") -> tuple[str, ...]:
        """Return the files directly in ``folder``, by default in the root."""
        return tuple(file for file in self.files if parent_of(file) == folder)

    def what_is_there(self) -> str:
        """Return the kinds of files in words, the most frequent first: ``2 .npz, 1 .csv``."""
        kinds = Counter(PurePosixPath(f).suffix.lower() or "without suffix" for f in self.files)
        return ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common(4)) or "no file"


def parent_of(path: str) -> str:
    """Return the folder of a relative path, empty for what lies in the root."""
    return path.rpartition("/")[0]


def tree_of(root: Path) -> Tree:
    """Return what lies below ``root``; links are followed, to each folder once.

    Hidden files and folders are left out, and said once with their number.

    Raises:
        DataError: a folder cannot be read.
    """
    files: list[str] = []
    folders: list[str] = []
    hidden: list[str] = []
    for folder, entries in _folders(root):
        folders.append(folder)
        for entry in entries:
            if is_hidden(entry.name):
                hidden += _files_of(root, entry)
            elif not _is_folder(entry) and _is_file(entry):
                files.append(_below(folder, entry.name))
    _say_hidden(root, hidden)
    return Tree(root, _sorted(files), _sorted(folders[1:]))


def require_text(folder: Path) -> None:
    """Refuse a folder whose name no report can hold, as archives of other systems leave them.

    Raises:
        DataError: it is no UTF-8.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise DataError(f"the name of {os.fsencode(folder)!r} is no UTF-8; rename it") from None


def _folders(root: Path) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Yield each visible folder from ``root`` on, which is the empty path, and what is in it.

    Folders behind links come last, so that a folder goes by its own name where it has one.
    """
    waiting, links = deque([""]), deque[str]()
    seen: set[tuple[int, int]] = set()
    again: list[str] = []
    while waiting or links:
        folder = (waiting or links).popleft()
        entries, identity = _entries(root / folder)
        if identity in seen:
            again.append(folder)
            continue
        seen.add(identity)
        yield folder, entries
        for entry in entries:
            if not is_hidden(entry.name) and _is_folder(entry):
                ahead = links if entry.is_symlink() else waiting
                ahead.append(_below(folder, entry.name))
    if again:
        say_once(f"{root}: {again[0]} leads to a folder that is read already; it is read once")


def _entries(folder: Path) -> tuple[list[os.DirEntry[str]], tuple[int, int]]:
    """Return what is in a folder, and what tells this folder from others by whatever name."""
    try:
        status = folder.stat()
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        return found, (status.st_dev, status.st_ino)
    except OSError as error:
        raise DataError(f"{folder}: {reason_of(error, 'read')}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link that leads to itself is no folder
            return False
        raise DataError(f"{entry.path}: {reason_of(error, 'read')}") from None


def _is_file(entry: os.DirEntry[str]) -> bool:
    # No pipe or socket, which would be waited for. A link to nowhere is refused when it is read.
    if not entry.is_symlink():
        return entry.is_file()
    file = Path(entry.path)
    return file.is_file() or not file.exists()


def _files_of(root: Path, hidden: os.DirEntry[str]) -> list[str]:
    """Return a hidden file, or what is in a hidden folder, as far as it may be read."""
    inside = [] if hidden.is_symlink() else os.walk(hidden.path)
    found = [Path(path, name) for path, _, names in inside for name in names]
    return [file.relative_to(root).as_posix() for file in found or [Path(hidden.path)]]


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _parts_of(path: str) -> list[str]:
    return path.split("/")


def _sorted(paths: list[str]) -> tuple[str, ...]:
    return tuple(sorted(paths, key=_parts_of))


def _say_hidden(root: Path, hidden: list[str]) -> None:
    """Say what was left out, except for names such as ``.DS_Store`` that are never data."""
    named = sorted(file for file in hidden if PurePosixPath(file).suffix)
    if named:
        say_once(
            f"{root}: {len(named)} hidden file{'s are' if len(named) > 1 else ' is'} not read, "
            f"such as {named[0]}"
        )

"""File tree below a data set's folder, hidden files apart."""

import os
from collections import Counter
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
        return tuple(file for file in self.files if file.startswith(f"{folder}/"))

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
    """Return what lies below ``root``; links are followed, but not to where they came from.

    Hidden files and folders are left out, and said once with their number.

    Raises:
        DataError: a folder cannot be read.
    """
    files: list[str] = []
    folders: list[str] = []
    hidden: list[str] = []
    for path, subfolders, names in os.walk(root, followlinks=True, onerror=_refuse):
        here = Path(path)
        subfolders[:] = [name for name in subfolders if not _leads_back(here, name)]
        inside = here.relative_to(root).as_posix()
        below = "" if inside == "." else f"{inside}/"
        is_data = not any(map(is_hidden, below.split("/")))
        folders += [below + name for name in subfolders if is_data and not is_hidden(name)]
        for name in names:
            (files if is_data and not is_hidden(name) else hidden).append(below + name)
    _say_hidden(root, hidden)
    return Tree(root, _sorted(files), _sorted(folders))


def _sorted(paths: list[str]) -> tuple[str, ...]:
    return tuple(sorted(paths, key=lambda path: path.split("/")))


def _leads_back(folder: Path, name: str) -> bool:
    link = folder / name
    return link.is_symlink() and link.resolve() in (folder.resolve(), *folder.resolve().parents)


def _say_hidden(root: Path, hidden: list[str]) -> None:
    """Say what was left out, except for names such as ``.DS_Store`` that are never data."""
    named = sorted(file for file in hidden if PurePosixPath(file).suffix)
    if named:
        say_once(
            f"{root}: {len(named)} hidden file{'s are' if len(named) > 1 else ' is'} not read, "
            f"such as {named[0]}"
        )


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: {reason_of(error, 'read')}")

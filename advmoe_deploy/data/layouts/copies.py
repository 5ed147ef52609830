"""Files of each split, of one copy where a folder holds several: the revisions of a cache."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from advmoe_deploy.data.layouts.listing import Wanted
from advmoe_deploy.data.layouts.tree import Tree, parent_of
from advmoe_deploy.data.notices import say_once
from advmoe_deploy.errors import DataError


def split_files(
    tree: Tree, suffixes: tuple[str, ...], wanted: Wanted
) -> tuple[list[str], list[str]] | None:
    """Return the training and the test files with one of ``suffixes``, or ``None`` without any.

    A file's name tells its split (``train-00000-of-00002.parquet``), or else its folder's; or both.

    Raises:
        DataError: the test split is missing.
    """
    copies: dict[str, dict[str, list[str]]] = {}
    for file in tree.files:
        if PurePosixPath(file).suffix.lower() in suffixes:
            folder, split = _folder_and_split(file, {*wanted.train, *wanted.test})
            copies.setdefault(folder, {}).setdefault(split, []).append(file)
    trained = {name: copy for name, copy in copies.items() if _first(copy, wanted.train)}
    whole = [name for name, copy in trained.items() if _first(copy, wanted.test)]
    if not trained:
        return None
    if not whole:
        file = _first(next(iter(trained.values())), wanted.train)[0]
        raise DataError(
            f"{tree.root} holds {file} to train on, and nothing called {', '.join(wanted.test)}; "
            "add the test split"
        )
    copy = trained[chosen_folder(tree.root, whole)]
    return _first(copy, wanted.train), _first(copy, wanted.test)


def _folder_and_split(file: str, known: set[str]) -> tuple[str, str]:
    folder = parent_of(file)
    words = re.split(r"[-_.]", PurePosixPath(file).stem.lower())
    around = PurePosixPath(folder).name.lower()
    split = next((word for word in words if word in known), around)
    return (parent_of(folder) if split == around else folder), split


def _first(copy: dict[str, list[str]], names: Iterable[str]) -> list[str]:
    return next((copy[name] for name in names if name in copy), [])


def chosen_folder(root: Path, folders: Iterable[str]) -> str:
    """Return one of ``folders``, relative to ``root``, and say which if there are several.

    It is the revision that the hub's cache calls ``main``, or else the last by name.
    """
    copies = sorted(set(folders))
    chosen = next((copy for copy in copies if _is_main(root, copy)), copies[-1])
    if len(copies) > 1:
        others = [copy or "." for copy in copies if copy != chosen]
        say_once(
            f"{root} holds {len(copies)} copies of the data; {chosen or '.'} is read, "
            f"{', '.join(others[:3])}{' and others' if len(others) > 3 else ''} not: name a "
            "folder to read another"
        )
    return chosen


def _is_main(root: Path, copy: str) -> bool:
    """Return whether ``copy`` lies in the snapshot that ``refs/main`` names."""
    parts = (PurePosixPath(root.as_posix()) / copy).parts
    if "snapshots" not in parts[:-1]:
        return False
    at = len(parts) - 1 - parts[::-1].index("snapshots")
    main = Path(*parts[:at]) / "refs" / "main"
    return (
        at + 1 < len(parts)
        and main.is_file()
        and main.read_text(errors="replace").strip() == parts[at + 1]
    )

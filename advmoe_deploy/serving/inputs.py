"""Inputs of a batch job: a folder, a pattern, one image, or a text file that lists images.

Nothing gets lost without a word: what is found is an input, or an input with the error that keeps
it from being read, or is counted as skipped with its reason.
"""

import codecs
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from advmoe_deploy.decoding import SUFFIXES
from advmoe_deploy.errors import DataError, reading
from advmoe_deploy.serving.search import IS_FOLDER, Search, Skipped, file_error

_WAY_OUT = "name a folder, a pattern, an image or a .txt list"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Listing(Sequence[str]):
    """Sorted paths; ``errors`` says of some why they cannot be read, ``skipped`` what is no input.

    The paths hold bytes that are no UTF-8 as Python's file functions do (surrogates).
    """

    paths: tuple[str, ...]
    errors: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self.paths[index]

    def __len__(self) -> int:
        return len(self.paths)


def list_inputs(source: str) -> Listing:
    """Return the paths that ``source`` stands for, sorted.

    A folder gives every image below it, by suffix, links followed and hidden files aside. A
    ``.txt`` file gives one path per line, relative to the file itself, whether or not the path
    exists. Anything else that exists is one image; the rest is a pattern, in which ``**`` crosses
    folders and folders that exist by the name given, brackets or not, are those folders. Folders
    and patterns give a file that links lead to once.

    Raises:
        DataError: nothing is there.
    """
    if not source:
        raise DataError(f"the input is an empty text; {_WAY_OUT}")
    path = Path(source)
    error = file_error(path)
    if error == IS_FOLDER:
        return _folder(path)
    if error is None and path.suffix.lower() == ".txt":
        return _given(_listed(path))
    return _given([source]) if os.path.lexists(source) else _pattern(path)


def _folder(source: Path) -> Listing:
    search = Search()
    search.images(source)
    return _found(search, f"{source} holds no {', '.join(sorted(SUFFIXES))} file")


def _pattern(source: Path) -> Listing:
    search = Search()
    search.match(Path(source.anchor), source.parts[bool(source.anchor) :])
    return _found(search, f"{source}: no such file or folder, and no file matches it as a pattern")


def _found(search: Search, complaint: str) -> Listing:
    paths, errors = search.files()
    skipped = search.skipped()
    if not paths and not errors:
        raise DataError("; ".join([complaint, *map(str, skipped), _WAY_OUT]))
    return Listing(tuple(sorted({*paths, *errors})), errors, skipped)


def _given(paths: Sequence[str]) -> Listing:
    errors = {path: error for path in paths if (error := file_error(Path(path)))}
    return Listing(tuple(sorted(paths)), errors)


def _listed(path: Path) -> list[str]:
    lines = re.split(r"\r\n?|\n", _text(path))
    paths = [_listed_path(path.parent, line) for line in lines if line.strip()]
    if not paths:
        raise DataError(f"{path} lists no path; {_WAY_OUT}")
    return paths


def _listed_path(folder: Path, line: str) -> str:
    exact = str(folder / line)
    return exact if os.path.lexists(exact) else str(folder / line.strip())


def _text(path: Path) -> str:
    """Return a list as text; names in it may be no UTF-8, just as file names may."""
    with reading(path):
        content = path.read_bytes()
    try:
        if content.startswith(_UTF16):
            text = content.decode("utf-16")
        else:
            text = os.fsdecode(content.removeprefix(codecs.BOM_UTF8))
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise DataError(f"{path} is no text; list one image path per line, in UTF-8")
    return text

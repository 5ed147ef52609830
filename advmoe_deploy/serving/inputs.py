"""Inputs of a batch job: a folder, a pattern, one file, or a list of files.

Nothing gets lost without a word: what is found is an input, or an input with the error that keeps
it from being read, or is counted as skipped with its reason.
"""

import codecs
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import overload

from advmoe_deploy.decoding import IMAGE_SUFFIXES
from advmoe_deploy.errors import DataError, reading
from advmoe_deploy.serving.parts import Files, Inputs, Part
from advmoe_deploy.serving.search import IS_FOLDER, SHARDS, FileSearch, Skipped, file_error, merged
from advmoe_deploy.serving.shards import open_shard
from advmoe_deploy.serving.tables import open_table

_WAY_OUT = "name a folder, a pattern, a file or a .txt list, or - for standard input"
_STDIN = "-"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class InputPaths(Sequence[str]):
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


def open_inputs(source: str) -> Inputs:
    """Return the images that ``source`` stands for, in a fixed order.

    Each path of :func:`list_inputs` is an image, or a shard: a ``.tar`` file gives the images in
    it in its own order, a ``.parquet`` file its rows.

    Raises:
        DataError: nothing is there.
        BackendUnavailableError: there is a parquet file, and pyarrow is not installed.
    """
    listing = list_inputs(source)
    parts: list[Part] = []
    skipped = list(listing.skipped)
    for kind, paths in groupby(listing, lambda path: _kind(path, listing.errors)):
        if kind == ".tar":
            for path in paths:
                images, others = open_shard(path)
                parts += images
                skipped += others
        elif kind == ".parquet":
            parts += [part for path in paths for part in open_table(path)]
        else:
            files = tuple(paths)
            found = {path: listing.errors[path] for path in files if path in listing.errors}
            parts.append(Files(files, found))
    return Inputs(tuple(parts), merged(skipped))


def _kind(path: str, errors: Mapping[str, str]) -> str:
    suffix = Path(path).suffix.lower()
    return suffix if suffix in SHARDS and path not in errors else ""


def list_inputs(source: str) -> InputPaths:
    """Return the paths that ``source`` stands for, sorted.

    A folder gives every image below it, by suffix, links followed and hidden files aside, or where
    there is none every shard. A ``.txt`` file gives one path per line, relative to the file itself,
    whether or not the path exists; ``-`` reads such lines from standard input, relative to the
    working folder. Anything else that exists is one file; the rest is a pattern, in which ``**``
    crosses folders and folders that exist by the name given, brackets or not, are those folders.
    Folders and patterns give a file that links lead to once.

    Raises:
        DataError: nothing is there.
    """
    if not source:
        raise DataError(f"the input is an empty text; {_WAY_OUT}")
    if source == _STDIN:
        return _given(_paths(sys.stdin.buffer.read(), Path(), "standard input"))
    path = Path(source)
    error = file_error(path)
    if error == IS_FOLDER:
        return _folder(path)
    if error is None and path.suffix.lower() == ".txt":
        with reading(path):
            content = path.read_bytes()
        return _given(_paths(content, path.parent, str(path)))
    return _given([source]) if os.path.lexists(source) else _pattern(path)


def _folder(source: Path) -> InputPaths:
    search = FileSearch()
    search.images(source)
    return _found(search, f"{source} holds no {', '.join((*IMAGE_SUFFIXES, *SHARDS))} file")


def _pattern(source: Path) -> InputPaths:
    search = FileSearch()
    search.match(Path(source.anchor), source.parts[bool(source.anchor) :])
    return _found(search, f"{source}: no such file or folder, and no file matches it as a pattern")


def _found(search: FileSearch, complaint: str) -> InputPaths:
    paths, errors = search.files()
    skipped = search.skipped()
    if not paths and not errors:
        raise DataError("; ".join([complaint, *map(str, skipped), _WAY_OUT]))
    return InputPaths(tuple(sorted({*paths, *errors})), errors, skipped)


def _given(paths: Sequence[str]) -> InputPaths:
    errors = {path: error for path in paths if (error := file_error(Path(path)))}
    return InputPaths(tuple(sorted(paths)), errors)


def _paths(content: bytes, folder: Path, where: str) -> list[str]:
    lines = re.split(r"\r\n?|\n", _text(content, where))
    paths = [_listed_path(folder, line) for line in lines if line.strip()]
    if not paths:
        raise DataError(f"{where} lists no path; {_WAY_OUT}")
    return paths


def _listed_path(folder: Path, line: str) -> str:
    exact = str(folder / line)
    return exact if os.path.lexists(exact) else str(folder / line.strip())


def _text(content: bytes, where: str) -> str:
    """Return a list as text; names in it may be no UTF-8, just as file names may."""
    try:
        if content.startswith(_UTF16):
            text = content.decode("utf-16")
        else:
            text = os.fsdecode(content.removeprefix(codecs.BOM_UTF8))
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise DataError(f"{where} is no text; list one image path per line, in UTF-8")
    return text

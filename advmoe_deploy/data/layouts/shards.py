"""WebDataset shards: tar files of images and labels, ``000000.jpg`` beside ``000000.cls``.

A label may also be a number in ``000000.json``, under a usual name such as ``label``.
A shard is read in place and never unpacked, so no member's name can lead anywhere.
"""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from advmoe_deploy.data.layouts.copies import split_files
from advmoe_deploy.data.layouts.listing import Listing, Wanted, joined
from advmoe_deploy.data.layouts.tree import Tree, is_hidden
from advmoe_deploy.decoding import IMAGE_SUFFIXES
from advmoe_deploy.errors import DataError, reason_of

_LARGEST_IMAGE = 256 << 20
_LARGEST_LABEL = 64
_LARGEST_JSON = 1 << 20


@dataclass(frozen=True)
class _Member:
    """Position of an image's bytes in a shard."""

    name: str
    offset: int
    size: int


def webdataset_shards(tree: Tree, wanted: Wanted) -> tuple[Listing, Listing] | None:
    """Return the training and test shards below a folder, or ``None`` if there are none.

    Raises:
        DataError: the test shards are missing, or one is damaged.
    """
    files = split_files(tree, (".tar",), wanted)
    if files is None:
        return None
    train, test = (joined([_shard(tree.root / file, wanted) for file in each]) for each in files)
    return train, test


def _shard(file: Path, wanted: Wanted) -> Listing:
    images, labels = _members(file, wanted)
    if lone := images.keys() ^ labels.keys():
        first = min(lone)
        lacks = f"image ({', '.join(IMAGE_SUFFIXES)})"
        if first in images:
            lacks = f"label (.cls, or .json with a number as {', '.join(wanted.labels)})"
        raise DataError(
            f"{file}: {first.strip('/')} has no {lacks}, nor have {len(lone) - 1} others; give "
            "each image a label, or unpack the file if it holds class folders"
        )
    members, stamp = list(images.values()), file.stat().st_mtime_ns

    def encoded(row: int) -> bytes:
        try:
            with file.open("rb") as stream:
                stream.seek(members[row].offset)
                return stream.read(members[row].size)
        except OSError as error:
            raise DataError(f"{file}: {reason_of(error, 'read')}") from None

    return Listing(
        labels_N=np.asarray([labels[key] for key in images], dtype=np.int64),
        class_names=(),
        encoded=encoded,
        where=lambda row: f"{file}, {members[row].name}",
        stamp=lambda row: f"{file} {stamp} {members[row].offset}",
    )


def _members(file: Path, wanted: Wanted) -> tuple[dict[str, _Member], dict[str, int]]:
    images: dict[str, _Member] = {}
    labels: dict[str, int] = {}
    described: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as shard:
            for member in shard:
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                key = f"{folder}/{key}"
                if not member.isreg() or any(map(is_hidden, PurePosixPath(member.name).parts)):
                    continue
                suffix = suffix.lower()
                if f".{suffix}" in IMAGE_SUFFIXES:
                    _require_size(file, member, _LARGEST_IMAGE)
                    images[key] = _Member(member.name, member.offset_data, member.size)
                elif suffix == "cls":
                    _require_size(file, member, _LARGEST_LABEL)
                    labels[key] = _label(file, member.name, _content(shard, member))
                elif suffix == "json":
                    _require_size(file, member, _LARGEST_JSON)
                    label = _described(file, member.name, _content(shard, member), wanted)
                    described |= {} if label is None else {key: label}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{file} is no readable tar file ({error}); unpack it if it is compressed, or "
            "download it again"
        ) from None
    if not images:
        raise DataError(
            f"{file} holds no image ({', '.join(IMAGE_SUFFIXES)}); name WebDataset shards"
        )
    return images, described | labels


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = shard.extractfile(member)
    return stream.read() if stream else b""


def _require_size(file: Path, member: tarfile.TarInfo, limit: int) -> None:
    if member.size > limit:
        raise DataError(f"{file}: {member.name} has {member.size:,} bytes; the limit is {limit:,}")


def _label(file: Path, name: str, text: bytes) -> int:
    if not text.strip().isdigit() or int(text) >= 1 << 31:
        raise DataError(
            f"{file}: {name} holds {text[:20]!r}, which is no class number; number them from 0"
        )
    return int(text)


def _described(file: Path, name: str, text: bytes, wanted: Wanted) -> int | None:
    """Return the label that a JSON object tells, if it does."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{file}: {name} is no JSON; write the shard again") from None
    fields = value if isinstance(value, dict) else {wanted.labels[0]: value}
    label = next((fields[key] for key in wanted.labels if key in fields), None)
    return None if label is None else _label(file, name, str(label).encode())

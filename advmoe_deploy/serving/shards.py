"""WebDataset shards as inputs: the images in a tar file, read in place and never unpacked.

Only the headers are read for the listing. Other members of a shard (labels, captions) are skipped.
"""

import io
import struct
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from advmoe_deploy.data.decode import DecodedImage, decode
from advmoe_deploy.decoding import IMAGE_SUFFIXES, Decoding
from advmoe_deploy.errors import DataError, reason_of
from advmoe_deploy.serving.names import shown
from advmoe_deploy.serving.parts import Decoded, Files, Part, Read, image_or_reason, said
from advmoe_deploy.serving.search import HIDDEN, NO_IMAGE, Skipped

# Of the text that stands before a member: names and extended headers are read into memory.
_LARGEST_HEADER = 1 << 20
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
# What the standard library raises on headers that make no sense.
_DAMAGE = (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError)
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class _Member:
    """An image in a shard, by the ``name`` of its row: where its bytes lie, or its ``error``."""

    name: str
    offset: int
    size: int
    error: str | None


@dataclass(frozen=True)
class Shard:
    """The images of one tar file, in its order."""

    path: str
    members: tuple[_Member, ...]

    def __len__(self) -> int:
        return len(self.members)

    def names(self, start: int) -> Iterator[str]:
        """Yield ``shard.tar/member``; of a name that comes again, ``#2`` and so on behind it."""
        return (self.members[i].name for i in range(start, len(self)))

    def reads(self, start: int) -> Iterator[Read]:
        """Yield what decodes each member."""
        for i in range(start, len(self)):
            member = self.members[i]
            yield said(member.error) if member.error else partial(_image, self.path, member)

    def stamp(self) -> Iterator[str]:
        """Yield the path, and each member with its place."""
        yield self.path
        for member in self.members:
            yield f"{member.name}\0{member.offset} {member.size} {member.error}"


def open_shard(path: str) -> tuple[list[Part], list[Skipped]]:
    """Return the images in the tar file at ``path``, and what else is in it.

    A file that is damaged, cut off or without an image gives a row with that error, after the
    rows of those images that are there.
    """
    members: list[_Member] = []
    skipped: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    error = None
    try:
        for header in _headers(Path(path)):
            _note(path, header, members, counts, skipped)
    except DataError as damage:
        error = str(damage)
    if not members and error is None:
        error = f"holds no image ({', '.join(IMAGE_SUFFIXES)})"
    parts: list[Part] = [Shard(path, tuple(members))] if members else []
    if error:
        parts.append(Files((path,), {path: error}))
    found = [
        Skipped(reason=reason, count=counts[reason], examples=tuple(examples))
        for reason, examples in skipped.items()
    ]
    return parts, found


def _note(
    path: str,
    header: tarfile.TarInfo,
    members: list[_Member],
    counts: Counter[str],
    skipped: dict[str, list[str]],
) -> None:
    """Enter one member where it belongs; folders belong nowhere."""
    inside = PurePosixPath(header.name)
    name = shown(f"{path}/{header.name}")
    if header.isdir():
        return
    hidden = inside.name.startswith(".")
    if hidden or inside.suffix.lower() not in IMAGE_SUFFIXES:
        reason = HIDDEN if hidden else NO_IMAGE
        counts[reason] += 1
        Skipped.exemplify(skipped.setdefault(reason, []), name)
        return
    counts[name] += 1
    again = f"#{counts[name]}" if counts[name] > 1 else ""
    members.append(_Member(name + again, header.offset_data, header.size, _fault(header, inside)))


def _fault(header: tarfile.TarInfo, inside: PurePosixPath) -> str | None:
    if inside.is_absolute() or ".." in inside.parts:
        return "its name leads out of the shard; store it under another"
    if header.issym() or header.islnk():
        return "a link; store the image itself"
    if header.type not in _PLAIN or header.issparse():
        return "not a regular file"
    return None


def _headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the header of each member.

    Raises:
        DataError: this is no tar file, or it is damaged or ends too early.
    """
    try:
        with path.open("rb") as file, _tar(file) as shard:
            while (header := shard.next()) is not None:
                if header.size < 0:
                    raise DataError("damaged: a member of negative size; make it again")
                yield header
                shard.members.clear()  # which would keep all headers
            file.seek(shard.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise DataError("damaged or cut off: the mark that ends a tar file is not there")
    except OSError as error:
        raise DataError(reason_of(error, "read")) from None
    except (*_DAMAGE, struct.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"damaged, cut off or compressed ({reason}); download it again, or unpack it (gunzip)"
        ) from None


def _tar(file: BinaryIO) -> Any:  # whose list of members is not in its types
    small: Any = _Small(file)
    return tarfile.open(fileobj=small, mode="r:", encoding="utf-8")


class _Small:
    """A file of which only little is read at once, as headers claim sizes of their own."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


class _Slice(io.RawIOBase):
    """The bytes of one member, as a file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError("a seek before the start of a file")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(view), max(0, self._size - self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def _image(path: str, member: _Member, decoding: Decoding) -> Decoded:
    return image_or_reason(partial(_decode, path, member, decoding), member.name)


def _decode(path: str, member: _Member, decoding: Decoding) -> DecodedImage:
    try:
        with Path(path).open("rb") as file:
            content = io.BufferedReader(_Slice(file, member.offset, member.size))
            return decode(content, member.name, decoding)
    except OSError as error:
        raise DataError(reason_of(error, "read")) from None

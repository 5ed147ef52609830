"""Parts of the inputs of a batch job: plain files, or one file that holds many images."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from advmoe_deploy.data.decode import DecodedImage, decode_file
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError, MachineError
from advmoe_deploy.serving.names import readable, shown
from advmoe_deploy.serving.search import Skipped

# An image, or why there is none.
Decoded = DecodedImage | str
Read = Callable[[Decoding], Decoded]


class Part(Protocol):
    """Some inputs in a fixed order, counted from 0."""

    def __len__(self) -> int:
        """Number of inputs."""

    def names(self, start: int) -> Iterator[str]:
        """Yield the name of each in its row, from the input numbered ``start`` on."""

    def reads(self, start: int) -> Iterator[Read]:
        """Yield what reads each, from the input numbered ``start`` on, for any thread to call."""

    def stamp(self) -> Iterator[str]:
        """Yield texts that tell these inputs from others, as far as the listing knows."""


@dataclass(frozen=True)
class Files:
    """Image files, one input each; ``errors`` says of some paths why they cannot be read."""

    paths: tuple[str, ...]
    errors: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def names(self, start: int) -> Iterator[str]:
        """Yield the paths as text."""
        return (shown(self.paths[i]) for i in range(start, len(self)))

    def reads(self, start: int) -> Iterator[Read]:
        """Yield what decodes each file."""
        for i in range(start, len(self)):
            path = self.paths[i]
            yield said(self.errors[path]) if path in self.errors else partial(_file, path)

    def stamp(self) -> Iterator[str]:
        """Yield each path, and its error if it has one."""
        return (f"{path}\0{self.errors.get(path, '')}" for path in self.paths)


@dataclass(frozen=True)
class Inputs:
    """All inputs of a job, part after part; ``skipped`` says what is no input."""

    parts: tuple[Part, ...]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def names(self, start: int = 0) -> Iterator[str]:
        """Yield the name of each input from ``start`` on."""
        for part, first in self._from(start):
            yield from part.names(first)

    def reads(self, start: int = 0) -> Iterator[Read]:
        """Yield what reads each input from ``start`` on."""
        for part, first in self._from(start):
            yield from part.reads(first)

    def digest(self) -> str:
        """Return a hash of the names and of what else the listing knows."""
        digest = hashlib.sha256()
        for part in self.parts:
            for text in part.stamp():
                digest.update(os.fsencode(text) + b"\0")
        return digest.hexdigest()

    def _from(self, start: int) -> Iterator[tuple[Part, int]]:
        for part in self.parts:
            if start < len(part):
                yield part, start
            start = max(0, start - len(part))


def said(reason: str) -> Read:
    """Return what says ``reason`` instead of reading anything."""
    return partial(_said, readable(reason))


def image_or_reason(read: Callable[[], DecodedImage], where: str) -> Decoded:
    """Return the image, or why it cannot be read without the name that ``where`` gives it."""
    try:
        return read()
    except (DataError, MachineError) as error:
        return readable(str(error).removeprefix(f"{where}: "))


def _file(path: str, decoding: Decoding) -> Decoded:
    return image_or_reason(lambda: decode_file(Path(path), decoding), str(Path(path)))


def _said(reason: str, _: Decoding) -> Decoded:
    return reason

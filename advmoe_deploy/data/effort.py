"""Bounds on the time that an image file may take to decode, whatever its pixels and bytes.

Files exist that are small and take minutes: a progressive JPEG draws all of its pixels again in
each scan, and headers of millions of tiny pieces are read piece by piece in Python.
"""

import os
import re
from typing import Any, BinaryIO

from advmoe_deploy.errors import DataError

# As libtiff allows in a TIFF; encoders write about ten.
MOST_SCANS = 100
# Pieces of 128 bytes on average, and 20,000 more: an encoder that writes row by row stays below.
_PIECES, _BYTES_OF_PIECE = 20_000, 128
_CHUNK = 4096
# Markers with a length, and the end. In coded data libjpeg passes over those below C0 and restarts,
# two bytes each: to skip a length behind one would hide the scans that follow it.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9


class Pieces:
    """A file that may be read in so many pieces as an honest image of its size has at most.

    Everything else is done by the file itself.
    """

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self._where = file, where
        self._left = _PIECES + file.seek(0, os.SEEK_END) // _BYTES_OF_PIECE
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes.

        Raises:
            DataError: too many pieces were read.
        """
        self._count()
        return self._file.read(size)

    def readline(self, size: int = -1) -> bytes:
        """Return the rest of a line; raises as :meth:`read` does."""
        self._count()
        return self._file.readline(size)

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise DataError(f"{self._where}: damaged image: it is all headers, in tiny pieces")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def require_few_scans(file: Pieces, where: str) -> None:
    """Refuse a JPEG that draws its pixels too often; the position in the file stays.

    Raises:
        DataError: it has more than :data:`MOST_SCANS` scans, or too many pieces.
    """
    position, scans = file.tell(), 0
    file.seek(2)  # behind the start of the image
    while (marker := _next_marker(file)) not in (None, _END_OF_IMAGE):
        scans += marker == _START_OF_SCAN
        if scans > MOST_SCANS:
            raise DataError(
                f"{where}: a JPEG of more than {MOST_SCANS} scans; save it as a baseline JPEG"
            )
        length = int.from_bytes(file.read(2), "big")
        file.seek(max(0, length - 2), os.SEEK_CUR)
    file.seek(position)


def _next_marker(file: Pieces) -> int | None:
    """Return the next marker's kind with the file behind it, or ``None`` at the file's end."""
    while chunk := file.read(_CHUNK):
        found = _MARKER.search(chunk)
        if found:
            file.seek(found.end() - len(chunk), os.SEEK_CUR)
            return chunk[found.end() - 1]
        if len(chunk) > 1 and chunk.endswith(b"\xff"):
            file.seek(-1, os.SEEK_CUR)
    return None

"""Compressed bodies, unpacked piece by piece: a small one must not grow to a large one at once."""

import gzip
import re
import zlib
from collections.abc import Iterator

from advmoe_deploy.serving.online.protocol import RefusedError

# What clients call a stream of zlib "deflate", as RFC 9110 does.
_WINDOWS = {b"gzip": 31, b"deflate": 15}
_STEP = 256 << 10  # bytes, about a millisecond's work
_WORTH_IT = 1400  # bytes, about those of one packet
_GZIP = re.compile(rb"(?:^|,)\s*gzip\s*(?:$|,|;(?!\s*q=0(?:\.0*)?\s*(?:,|$)))", re.IGNORECASE)


class UnreadError(RefusedError):
    """A request refused before its body was read to the end, or could be."""


class Unpacker:
    """Unpacks a body of one encoding."""

    def __init__(self, encoding: bytes) -> None:
        """Begin; an encoding that is not known is refused (415)."""
        if encoding not in _WINDOWS:
            name = encoding.decode("latin-1")
            raise UnreadError(f"content-encoding '{name}' is not supported; send gzip", 415)
        self._stream = zlib.decompressobj(_WINDOWS[encoding])

    def parts(self, piece: bytes) -> Iterator[bytes]:
        """Yield what ``piece`` holds in parts of bounded length.

        Raises:
            UnreadError: it is damaged, or goes on behind its end.
        """
        more = True
        while more:
            try:
                part = self._stream.decompress(piece, _STEP)
            except zlib.error:
                raise UnreadError("the body is not what its content-encoding says") from None
            piece = self._stream.unconsumed_tail
            more = bool(piece) or len(part) == _STEP
            yield part
        if self._stream.unused_data:
            raise UnreadError("the body goes on behind the end of what is compressed")

    def finish(self) -> None:
        """Raise :class:`UnreadError` if the end is missing."""
        if not self._stream.eof:
            raise UnreadError("the compressed body is cut off")


def packed(body: bytes) -> bytes:
    """Return ``body`` in gzip, quickly rather than small."""
    return gzip.compress(body, compresslevel=1, mtime=0)


def wants_gzip(accepted: bytes, length: int) -> bool:
    """Return whether an answer of so many bytes is worth it, and ``Accept-Encoding`` allows it."""
    return length >= _WORTH_IT and _GZIP.search(accepted) is not None

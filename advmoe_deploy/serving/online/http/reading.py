"""Requests as they are read: wishes for another protocol, and bodies within the limits."""

import asyncio
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import httptools
from starlette.types import Receive, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from advmoe_deploy.serving.online.http.packing import Unpacker, UnreadError
from advmoe_deploy.serving.online.limits import Hold
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.protocol import CLIENT_LEFT, NO_MEMORY, ClientLeftError
from advmoe_deploy.serving.online.service import Arrival

# The key in the scope of a request under which a function says whether its client has left.
GONE = "advmoe.gone"
# The key under which is a function that has the rest of a request's body dropped as it comes.
DROP = "advmoe.drop"
# The key under which is the status by which the connection itself refused the rest of a request.
REFUSED = "advmoe.refused"

Headers = Iterable[tuple[bytes, bytes]]

_HEAD_BYTES = 32 << 10
# A body in chunks of a byte each costs a hundred times a body in one piece.
_SMALL_CHUNKS = 1000
_SMALLEST_CHUNK = 64  # bytes, on average


def parse(reader: HttpToolsProtocol, data: bytes) -> None:
    """Have ``reader`` parse ``data``; heads that wish for another protocol, without that wish."""
    rest, parser = memoryview(data), reader.parser
    while rest:
        try:
            parser.feed_data(rest)
            return
        except httptools.HttpParserUpgrade as upgrade:
            rest = rest[upgrade.args[0] :]
        method, version = parser.get_method(), parser.get_http_version()
        parser.feed_data(_without_upgrade(method, reader.url, version, reader.headers))


def _without_upgrade(method: bytes, url: bytes, version: str, headers: Headers) -> bytes:
    """Return the head of a request without its wish for another protocol.

    A server may ignore the wish (RFC 9110, section 7.8); the parser takes what follows it for that
    protocol, and would not find the body.
    """
    first = b"%b %b HTTP/%b\r\n" % (method, url, version.encode())
    kept = (b"%b: %b\r\n" % each for each in headers if each[0] != b"upgrade")
    return b"".join((first, *kept, b"\r\n"))


class Sizes:
    """Bytes and chunks of a request, counted as they are parsed.

    Attributes:
        body: bytes of the body.
    """

    LONG_HEAD = f"the head or trailer of the request exceeds {_HEAD_BYTES} bytes"
    SHORT_CHUNKS = f"the chunks are shorter than {_SMALLEST_CHUNK} bytes"

    def __init__(self) -> None:
        """Begin with nothing."""
        self._head = self.body = self._chunks = 0
        self._parsed = self._unparsed = 0  # bytes of whole headers and bodies, and those since

    def begin(self) -> None:
        """Begin a request."""
        self._head = self.body = self._chunks = 0

    def add_head(self, length: int) -> bool:
        """Count a piece of the head; return whether that is too much."""
        self._parsed += length
        self._head += length
        return self._head > _HEAD_BYTES

    def add_body(self, length: int) -> None:
        """Count a piece of the body."""
        self._parsed += length
        self.body += length

    def add_chunk(self) -> bool:
        """Count the head of a chunk; return whether that is one too many of next to nothing."""
        self._parsed += len(b"0\r\n\r\n")
        self._chunks += 1
        return self._chunks > _SMALL_CHUNKS and self.body < _SMALLEST_CHUNK * self._chunks

    def looked_at(self, length: int) -> bool:
        """Count ``length`` bytes that the parser took; return whether the head is too much.

        It may keep some of them for later.
        """
        parsed, self._parsed = self._parsed, 0
        self._unparsed = max(0, length - parsed) if parsed else self._unparsed + length
        return self._head + self._unparsed > _HEAD_BYTES


class Reader(Protocol):
    """Reader of requests from a connection."""

    def drop_rest(self, request: int) -> None:
        """Drop what is still to come of the body of this ``request``, by its number, unseen."""


def links(reader: Reader, cycle: RequestResponseCycle, request: int) -> dict[str, Any]:
    """Return what the scope of a ``request``, by its number, has of its connection.

    Weak, since a circle in each request would keep the collector busy, and everybody waiting.
    """
    gone, drop = partial(_is_gone, weakref.ref(cycle)), partial(_drop, weakref.ref(reader), request)
    return {GONE: gone, DROP: drop}


def _is_gone(cycle: weakref.ref[RequestResponseCycle]) -> bool:
    living = cycle()
    return living is None or living.disconnected


def _drop(reader: weakref.ref[Reader], request: int) -> None:
    living = reader()
    if living is not None:
        living.drop_rest(request)


def left(scope: Scope) -> int:
    """Return under which status a request counts whose client has left; 0 while it is there."""
    return scope.get(REFUSED, CLIENT_LEFT) if scope.get(GONE, never)() else 0


def never() -> bool:
    """Return that a client is not known to have left."""
    return False


async def read_body(
    models: Models,
    receive: Receive,
    headers: Mapping[bytes, bytes],
    copies: int,
    hold: Hold,
    arrival: Arrival,
) -> bytes | bytearray:
    """Return the body, unpacked, for which ``hold`` is charged ``copies`` times its length.

    What has come is charged, not what is announced: else a head alone would take the memory. A
    body for which there is no room now is refused at its head, all the same.

    Raises:
        UnreadError: its encoding is unknown (415), it is too long (413), or the memory is taken
            (503).
        RefusedError: it cannot be unpacked, or its client has left.
    """
    unpacker = _unpacker(headers)
    _require_room(models, int(headers.get(b"content-length", 0)), copies)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        arrival.hear(more=message["more_body"])
        piece: bytes = message["body"]
        if unpacker is not None:
            for part in unpacker.parts(piece):
                body += part
                _admit(models, len(body), copies, hold)
                await asyncio.sleep(0)
        elif not body and not message["more_body"]:
            _admit(models, len(piece), copies, hold)
            return piece
        else:
            body += piece
            _admit(models, len(body), copies, hold)
        if not message["more_body"]:
            if unpacker is not None:
                unpacker.finish()
            return body


def _require_room(models: Models, length: int, copies: int) -> None:
    with models.shared.budget.hold() as tried:
        _admit(models, length, copies, tried)


def _admit(models: Models, length: int, copies: int, hold: Hold) -> None:
    limit = models.limits.max_body
    if length > limit:
        raise UnreadError(f"the body exceeds the limit of {limit} bytes; send fewer images", 413)
    if not models.reserve(hold, copies * length):
        raise UnreadError(NO_MEMORY, 503, retry_s=1)


def _unpacker(headers: Mapping[bytes, bytes]) -> Unpacker | None:
    encoding = headers.get(b"content-encoding", b"identity").lower()
    return None if encoding == b"identity" else Unpacker(encoding)

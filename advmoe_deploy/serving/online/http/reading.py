"""Bodies of requests, read within the limits."""

import asyncio
from collections.abc import Mapping

from starlette.types import Receive, Scope

from advmoe_deploy.serving.online.http.connection import GONE, REFUSED
from advmoe_deploy.serving.online.http.packing import Unpacker, UnreadError
from advmoe_deploy.serving.online.limits import Hold
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.protocol import CLIENT_LEFT, NO_MEMORY, ClientLeftError
from advmoe_deploy.serving.online.service import Arrival


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

    Raises:
        UnreadError: its encoding is unknown (415), it is too long (413), or the memory is taken
            (503).
        RefusedError: it cannot be unpacked, or its client has left.
    """
    unpacker = _unpacker(headers)
    _admit(models, int(headers.get(b"content-length", 0)), copies, hold)
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


def _admit(models: Models, length: int, copies: int, hold: Hold) -> None:
    limit = models.limits.max_body
    if length > limit:
        raise UnreadError(f"the body exceeds the limit of {limit} bytes; send fewer images", 413)
    if not models.reserve(hold, copies * length):
        raise UnreadError(NO_MEMORY, 503, retry_s=1)


def _unpacker(headers: Mapping[bytes, bytes]) -> Unpacker | None:
    encoding = headers.get(b"content-encoding", b"identity").lower()
    return None if encoding == b"identity" else Unpacker(encoding)

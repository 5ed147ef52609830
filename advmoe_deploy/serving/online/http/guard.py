"""Guard against requests of strangers, and those that a web page makes some browser send.

The former show no token, the latter tell by their host or origin.
"""

import asyncio
import re
from collections.abc import Awaitable, Sequence

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from advmoe_deploy.serving.online.access.token import HOW_TO_ENTER, Token
from advmoe_deploy.serving.online.http.reading import left
from advmoe_deploy.serving.online.operations.requests import (
    REQUEST_ID,
    Record,
    Watcher,
    record_of,
    tell,
)
from advmoe_deploy.serving.online.protocol import CLIENT_LEFT

# The key in the scope of a request under which its headers are, as a dictionary of bytes.
HEADERS = "advmoe.headers"
# The key under which is its record.
RECORD = "advmoe.record"
_ID = REQUEST_ID.encode()
# Who looks whether a server lives has no token; the page for people asks them for it.
_OPEN = {"/v2/health/live", "/v2/health/ready", "/"}
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]*))(?::\d*)?", re.IGNORECASE)

_WAY_ROUND = "ask from the page's own backend, or put page and server behind one proxy"


class Guard:
    """Middleware that lets only requests through that call this server by one of its names.

    A page elsewhere whose name leads here (DNS rebinding) calls it by that name; one that sends a
    form or text here says so by its origin. As it sees every request and every answer, it also
    keeps the records of requests, and gives answers their ids.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: frozenset[str] | None,
        token: Token | None = None,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        """Take the names; ``None`` is any, for a server that other machines reach.

        With a ``token``, requests have to show it, but for those that ask for the server's health.
        The ``watchers`` are told of each request.
        """
        self._app, self._hosts, self._token, self._watchers = app, hosts, token, watchers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = scope[HEADERS] = dict(scope["headers"])
        record = scope[RECORD] = record_of(headers)
        app = self._refused(scope, headers) or self._app
        try:
            await app(scope, receive, _with_id(record, scope, send))
        except asyncio.CancelledError:
            record.status = record.status if record.answered else CLIENT_LEFT
            raise
        finally:
            if self._watchers:
                path: bytes = scope.get("raw_path") or scope["path"].encode()
                record.method, record.name = scope["method"], path.decode("latin-1")
                if not record.answered:
                    record.status = left(scope) or record.status
                tell(record, self._watchers)

    def _refused(self, scope: Scope, headers: dict[bytes, bytes]) -> JSONResponse | None:
        names = [name for name, _ in scope["headers"]].count(b"host")
        if refusal := self._refusal(headers, names, scope["http_version"]):
            status, message = refusal
            return JSONResponse({"error": message}, status)
        if self._token is not None and scope["path"] not in _OPEN:
            shown = headers.get(b"authorization")
            if not self._token.admits(shown):
                return _unauthorised(shown is not None)
        return None

    def _refusal(
        self, headers: dict[bytes, bytes], names: int, version: str
    ) -> tuple[int, str] | None:
        if names > 1:
            return 400, "the request names more than one Host"
        authority = headers.get(b"host")
        if authority is None:
            return (400, "the request names no Host") if version == "1.1" else None
        if self._hosts is not None and _name_of(authority) not in self._hosts:
            return 421, (
                "this server is not called by that Host; --allow-host NAME, or 'hosts' of the "
                "application for Ray Serve, lets it be"
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.rpartition(b"//")[2].lower() != authority.lower():
            return 403, f"requests from pages of another origin are refused; {_WAY_ROUND}"
        if headers.get(b"sec-fetch-site") in {b"cross-site", b"same-site"}:
            return 403, f"requests from pages of another site are refused; {_WAY_ROUND}"
        return None


def _with_id(record: Record, scope: Scope, send: Send) -> Send:
    """Return what sends an answer with the id of ``record``, and notes its status there.

    Whoever leaves after the body of the answer has its answer: what is refused unread lingers.
    """
    header = (_ID, record.id.encode())

    def sent(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            message["headers"] = [*message["headers"], header]
        elif message.get("body") and not left(scope):
            record.answered = True
        return send(message)

    return sent


def _unauthorised(has_shown: bool) -> JSONResponse:
    challenge = "Bearer" + ' error="invalid_token"' * has_shown
    return JSONResponse({"error": HOW_TO_ENTER}, 401, headers={"WWW-Authenticate": challenge})


def _name_of(authority: bytes) -> str | None:
    found = _AUTHORITY.fullmatch(authority.decode("latin-1"))
    return (found[1] or found[2]).lower() if found else None

"""Guard against requests of strangers, and those that a web page makes some browser send.

The former show no token, the latter tell by their host or origin.
"""

import re

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from advmoe_deploy.serving.online.access.token import HOW_TO_ENTER, Token

# The key in the scope of a request under which its headers are, as a dictionary of bytes.
HEADERS = "advmoe.headers"
# Who looks whether a server lives has no token; the page for people asks them for it.
_OPEN = {"/v2/health/live", "/v2/health/ready", "/"}
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]*))(?::\d*)?", re.IGNORECASE)


class Guard:
    """Middleware that lets only requests through that call this server by one of its names.

    A page elsewhere whose name leads here (DNS rebinding) calls it by that name; one that sends a
    form or text here says so by its origin.
    """

    def __init__(
        self, app: ASGIApp, hosts: frozenset[str] | None, token: Token | None = None
    ) -> None:
        """Take the names; ``None`` is any, for a server that other machines reach.

        With a ``token``, requests have to show it, but for those that ask for the server's health.
        """
        self._app, self._hosts, self._token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, or refuse it."""
        if scope["type"] == "http":
            headers = scope[HEADERS] = dict(scope["headers"])
            names = [name for name, _ in scope["headers"]].count(b"host")
            if refusal := self._refusal(headers, names, scope["http_version"]):
                status, message = refusal
                await JSONResponse({"error": message}, status)(scope, receive, send)
                return
            if self._token is not None and scope["path"] not in _OPEN:
                shown = headers.get(b"authorization")
                if not self._token.admits(shown):
                    await _unauthorised(shown is not None)(scope, receive, send)
                    return
        await self._app(scope, receive, send)

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
            return 403, "requests from pages of another origin are refused"
        if headers.get(b"sec-fetch-site") in {b"cross-site", b"same-site"}:
            return 403, "requests from pages of another site are refused"
        return None


def _unauthorised(has_shown: bool) -> JSONResponse:
    challenge = "Bearer" + ' error="invalid_token"' * has_shown
    return JSONResponse({"error": HOW_TO_ENTER}, 401, headers={"WWW-Authenticate": challenge})


def _name_of(authority: bytes) -> str | None:
    found = _AUTHORITY.fullmatch(authority.decode("latin-1"))
    return (found[1] or found[2]).lower() if found else None

"""One connection of the HTTP server: what it may send is bounded in size, number and time.

uvicorn's protocol over the parser llhttp, which refuses what can be read in two ways, such as a
Content-Length together with chunks. Errors of the protocol are answered as JSON, like all others.
"""

import asyncio
import http
import json
import select
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from advmoe_deploy.serving.online.limits import Limits

_HEAD_BYTES = 32 << 10
_HEADERS = 100
_PIPELINED = 8
# A body in chunks of a byte each costs a hundred times a body in one piece.
_SMALL_CHUNKS = 1000
_SMALLEST_CHUNK = 64  # bytes, on average
# How long an answer to half a request stays in the line before the connection is reset.
_LINGER_S = 2.0
# How many connections beyond the limit are told so; those after them are closed without a word.
_TOLD = 128
# The key in the scope of a request under which a function says whether its client has left.
GONE = "advmoe.gone"


class _RefusedError(Exception):
    """Ends the parsing of a connection."""


class Connection(HttpToolsProtocol):
    """One connection; ``stopping`` says whether each answer is the last one on its connection."""

    def __init__(
        self, *args: Any, limits: Limits, stopping: Callable[[], bool], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._limits, self._stopping = limits, stopping
        self._refusal: tuple[int, str] | None = None
        self._over = False  # whether nothing that comes is looked at any more
        self._crowded = False
        self._request = 0
        # The request ahead of the newest one.
        self._before: RequestResponseCycle = None  # type: ignore[assignment]
        self._part: str | None = "nothing"  # of the request that is being read
        self._awaited: tuple[int, str | None] = (0, None)
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._head_bytes = self._header_bytes = self._body_bytes = self._chunks = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless there are too many already."""
        super().connection_made(transport)
        self._crowded = len(self.connections) > self._limits.connections
        if len(self.connections) > self._limits.connections + _TOLD:
            self._over = True
            transport.abort()
        self._await_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of the timers as well."""
        super().connection_lost(exc)
        self._over = True
        if self._unread is not None:
            self._unread.cancel()
        self._await_rest()

    def data_received(self, data: bytes) -> None:
        """Parse what came, within the limits."""
        if self._over:
            return
        try:
            self.parser.feed_data(data)
            if self._part == "head":
                self._head_bytes += len(data)
                if self._head_bytes > _HEAD_BYTES:
                    self._refuse(431, f"the head of the request exceeds {_HEAD_BYTES} bytes")
        except httptools.HttpParserUpgrade:
            self.finish()  # HTTP/1.1 is all there is, and what follows would be another protocol
            self._over = True
        except httptools.HttpParserError as error:
            told = isinstance(error, httptools.HttpParserCallbackError)  # of our own code
            reason = "" if told else f": {error}"
            self._refuse(*(self._refusal or (400, f"this is no HTTP/1.1 request{reason}")))
        self._await_rest()

    def on_message_begin(self) -> None:
        """Begin the head of a request."""
        super().on_message_begin()
        self._unset_keepalive_if_required()  # now, since empty lines may come before a request
        self._request += 1
        self._part = "head"
        self._head_bytes = self._header_bytes = self._body_bytes = self._chunks = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, if there are not too many."""
        self._header_bytes += len(name) + len(value)
        if len(self.headers) == _HEADERS or self._header_bytes > _HEAD_BYTES:
            raise self._refused(
                431, f"more than {_HEADERS} headers, or {_HEAD_BYTES} bytes of them"
            )
        if self._part == "head":  # else it is a trailer, which must not pass for a header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin the body of a request and hand the request on."""
        if self.parser.get_http_version() not in {"1.0", "1.1"}:
            raise self._refused(400, "this is no HTTP/1.1 request")
        if self._crowded:
            raise self._refused(503, "too many connections are open; try again later")
        if len(self.pipeline) == _PIPELINED:
            raise self._refused(400, f"more than {_PIPELINED} requests are ahead of their answers")
        self._before = self.cycle
        super().on_headers_complete()
        self._part = "body"
        cycle = self.cycle
        cycle.scope[GONE] = lambda: cycle.disconnected  # type: ignore[literal-required]
        if self._stopping():
            cycle.keep_alive = False

    def on_chunk_header(self) -> None:
        """Count the chunks of a body."""
        self._chunks += 1
        if self._chunks > _SMALL_CHUNKS and self._body_bytes < _SMALLEST_CHUNK * self._chunks:
            raise self._refused(400, f"the chunks are shorter than {_SMALLEST_CHUNK} bytes")

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request: what follows is another one."""
        super().on_message_complete()
        self._part = None

    def on_response_complete(self) -> None:
        """Go on to the next request, which may have begun already."""
        super().on_response_complete()
        if self._part == "head":
            self._unset_keepalive_if_required()

    def pause_writing(self) -> None:
        """Wait for a client to read, though not for long."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._limits.body_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def finish(self) -> None:
        """Close now if no request is under way, else after the answer, which says so."""
        if not self.is_idle:
            self.cycle.keep_alive = False
        elif self._part != "head" and not self._has_more():
            self.transport.close()

    def give_up(self) -> None:
        """Answer no request that is not here whole: the server is stopping."""
        if self._part in {"head", "body"}:
            self._refuse(503, "the server is stopping; ask again elsewhere")

    @property
    def is_idle(self) -> bool:
        """Whether no answer is owed, as far as what was read goes."""
        return self.cycle is None or self.cycle.response_complete

    def _has_more(self) -> bool:
        """Return whether something came that was not read yet: to close now would lose it."""
        sock = self.transport.get_extra_info("socket")
        if sock is None or sock.fileno() < 0 or not hasattr(select, "poll"):
            return False
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def _await_rest(self) -> None:
        """Set the timer for the part of a request that is being read."""
        awaited = (self._request, None if self._over else self._part)
        if awaited == self._awaited:
            return
        self._awaited = awaited
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        first = max(self._limits.head_s, self._limits.keep_alive_s)
        seconds = {"nothing": first, "head": self._limits.head_s, "body": self._limits.body_s}
        if awaited[1] is not None:
            self._timer = self.loop.call_later(seconds[awaited[1]], self._late, awaited[1])

    def _late(self, part: str) -> None:
        if part == "nothing":
            self._over = True
            self.transport.close()
        else:
            limit = self._limits.head_s if part == "head" else self._limits.body_s
            self._refuse(408, f"the {part} of the request did not come within {limit:g} s")

    def _refused(self, status: int, message: str) -> _RefusedError:
        self._refusal = status, message
        return _RefusedError()

    def _refuse(self, status: int, message: str) -> None:
        """Answer what is being read with an error, and close as soon as the client has seen it."""
        if self._over or self.transport.is_closing():
            return
        self._over = True
        if self.pipeline and self.cycle.more_body:
            self.pipeline.popleft()
            self.cycle = self._before
        cycle = self.cycle
        if not self.is_idle and not cycle.more_body:
            self.finish()  # earlier requests are owed their answers, the last of which says so
            return
        if not self.is_idle and cycle.response_started:
            self.transport.abort()
            return
        if self.is_idle and self._part == "body":
            self.transport.close()  # it has its answer
            return
        if not self.is_idle:
            cycle.disconnected = True  # whoever reads the body need not wait
            cycle.message_event.set()
        self.transport.write(_answer(status, message))
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.abort)


def _answer(status: int, message: str) -> bytes:
    body = json.dumps({"error": message}).encode()
    retry = "retry-after: 1\r\n" if status == 503 else ""
    head = (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n{retry}connection: close\r\n\r\n"
    )
    return head.encode() + body

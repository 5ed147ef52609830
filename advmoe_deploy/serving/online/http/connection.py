"""One connection of the HTTP server: what it may send is bounded in size, number and time.

uvicorn's protocol over the parser llhttp, which refuses what can be read in two ways, such as a
Content-Length together with chunks. Errors of the protocol are answered as JSON, like all others.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from advmoe_deploy.serving.online.http.accept import HEALTH, PROBES, SPARE, TOO_MANY, refusal
from advmoe_deploy.serving.online.http.reading import REFUSED, Sizes, links, parse
from advmoe_deploy.serving.online.limits import Limits
from advmoe_deploy.serving.online.shedding import Again, Shed, Shedding, is_short
from advmoe_deploy.serving.online.turns import EveryTurn, Flow, Inbox

_HEADERS = 100
_PIPELINED = 8
# Bytes of their bodies beyond which nothing more is read. Until then it is, since who has left
# is noticed by reading alone.
_PIPELINED_BYTES = 64 << 10
# How long an answer to half a request stays in the line before the connection is reset.
_LINGER_S = 2.0


class _RefusedError(Exception):
    """Ends the parsing of a connection."""


class Connection(HttpToolsProtocol):
    """One connection; ``stopping`` says whether each answer is the last one on its connection.

    Its work takes ``turns``, but for requests for health. What is to be ``shed`` never begins.
    """

    def __init__(
        self,
        *args: Any,
        limits: Limits,
        stopping: Callable[[], bool],
        turns: EveryTurn,
        shed: Shedding,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._refused_unread: Shed | None = None  # why the request that is being read is refused
        self._limits, self._stopping, self._turns, self._shed = limits, stopping, turns, shed
        self._refusal: tuple[int, str] | None = None
        self._over = False  # whether nothing that comes is looked at any more
        self._is_dropped = False  # whether the rest of the body that is being read is
        self._crowded = False
        self._running: RequestResponseCycle | None = None
        # The request ahead of the newest one.
        self._before: RequestResponseCycle = None  # type: ignore[assignment]
        self._part: str | None = "nothing"  # of the request that is being read
        self._awaited: tuple[int, str | None] = (0, None)
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._request, self._sizes, self._again = 0, Sizes(), Again()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless there are too many already."""
        super().connection_made(transport)
        self.flow = Flow(transport, self._turns.reads)
        self._inbox = Inbox(self._turns.looks, self.flow)
        self._crowded = len(self.connections) > self._limits.connections
        if len(self.connections) > self._limits.connections + SPARE:
            self._over = True
            transport.abort()
        self._await_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell all requests that nobody waits for their answers, and let go of the timers."""
        self._be_alone()
        if self._refused_unread is not None:
            self._refused_unread.leave()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # else it holds one that was reset until its time
        self._over = True
        self.resume_writing()
        self._await_rest()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Take the client for gone, and close in a turn with others: thousands may go at once."""
        self._be_alone()
        if self.scheme != "http":
            return False  # TLS closes by itself
        self._turns.ends.call(self.transport.close)
        return True

    def _be_alone(self) -> None:
        for cycle in (self._running, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        for cycle, _ in self.pipeline:
            cycle.on_response = lambda: None  # it never begins, and would hold us in a circle
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        """Parse what came within the limits: now if it asks for health, else in its turn."""
        self._inbox.put(data, self._look_at, is_urgent=data.startswith(PROBES))

    def _look_at(self, data: bytes) -> None:
        if self._over or self._is_refused_again(data):
            return
        is_first = self._part in {None, "nothing"}
        try:
            parse(self, data)
            if self._sizes.looked_at(len(data)):
                self._refuse(431, Sizes.LONG_HEAD)
        except httptools.HttpParserError as error:
            told = isinstance(error, httptools.HttpParserCallbackError)  # of our own code
            reason = "" if told else f": {error}"
            self._refuse(*(self._refusal or (400, f"this is no HTTP/1.1 request{reason}")))
        self._await_rest()
        if is_first and self._part is None:
            self._again.keep(data, self._sizes.body)
        ahead = sum(len(cycle.body) for cycle, _ in self.pipeline)
        if 0 < len(self.pipeline) < _PIPELINED and ahead <= _PIPELINED_BYTES:
            self.flow.resume_reading()

    def on_message_begin(self) -> None:
        """Begin the head of a request."""
        super().on_message_begin()
        self._unset_keepalive_if_required()  # now, since empty lines may come before a request
        self._again.forget()
        self._request += 1
        self._part = "head"
        self._sizes.begin()

    def on_url(self, url: bytes) -> None:
        """Take a piece of the address, if it is not too long."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, if there are not too many."""
        self._count_head(len(name) + len(value) + len(b": \r\n"))
        if len(self.headers) == _HEADERS:
            raise self._refused(431, f"the request has more than {_HEADERS} headers")
        if self._part == "head":  # else it is a trailer, which must not pass for a header
            super().on_header(name, value)

    def _count_head(self, length: int) -> None:
        if self._sizes.add_head(length):
            raise self._refused(431, Sizes.LONG_HEAD)

    def on_headers_complete(self) -> None:
        """Begin the body of a request and hand the request on."""
        is_tunnel = self.parser.get_method() == b"CONNECT"
        if self.parser.get_http_version() not in {"1.0", "1.1"} or is_tunnel:
            raise self._refused(400, "this is no HTTP/1.1 request")
        if self.parser.should_upgrade():
            return  # the parser stops here, and the head is read again
        if self._crowded and not self.url.startswith(HEALTH.encode()):
            raise self._refused(503, TOO_MANY)
        if len(self.pipeline) == _PIPELINED:
            raise self._refused(400, f"more than {_PIPELINED} requests are ahead of their answers")
        self._before = self.cycle
        if self._is_shed():
            self._part = "body"
            return
        super().on_headers_complete()
        self._part = "body"
        self.cycle.scope.update(links(self, self.cycle, self._request))  # type: ignore[typeddict-item]
        if self._stopping() or self._crowded:
            self.cycle.keep_alive = False

    def _is_shed(self) -> bool:
        """Return whether the request is refused already, so that its body is dropped as it comes.

        Raises:
            _RefusedError: its body is not worth that.
        """
        is_behind = not self.is_idle or self.flow.write_paused  # answers that are made, or unread
        if is_behind or self.parser.get_method() != b"POST":
            return False
        self._refused_unread = shed = self._shed(self.url, self.headers)
        if shed and (self.expect_100_continue or not is_short(self.headers)):
            raise self._refused(503, shed.reason)
        return shed is not None

    def on_chunk_header(self) -> None:
        """Count the chunks of a body."""
        if self._sizes.add_chunk():
            raise self._refused(400, Sizes.SHORT_CHUNKS)

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._sizes.add_body(len(body))
        if self._is_dropped:
            self.flow.pause_reading()
            self.flow.resume_reading()  # in its turn
        elif self._refused_unread is None:
            super().on_body(body)

    def drop_rest(self, request: int) -> None:
        """Drop what is still to come of the body of this ``request``, by its number, unseen."""
        if request == self._request and self._part == "body":
            self._is_dropped = True
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        """End a request: what follows is another one."""
        self._is_dropped = False
        if self._refused_unread is not None:
            self._again.is_refused = True
            self._answer_unread(self._refused_unread)
            if self._over:
                raise _RefusedError  # what follows has no answer
        elif not self.parser.should_upgrade():
            super().on_message_complete()
            self._part = None
            if not self.pipeline:
                self.flow.resume_reading()  # who has left is noticed by reading alone

    def _answer_unread(self, shed: Shed) -> None:
        self._part = self._refused_unread = None
        stays = self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"
        last = self._stopping() or self._crowded or not stays
        self.transport.write(shed.answer(503, shed.reason, last=last))
        if last:
            self._over = True
            self.transport.close()
        else:
            super().on_response_complete()

    def _is_refused_again(self, data: bytes) -> bool:
        """Refuse ``data``, and say so, if it was refused last and there is still no room."""
        is_again = self._part is None and not self.flow.write_paused and self._again.is_in(data)
        shed = self._shed(self.url, self.headers) if is_again else None
        if shed is not None:
            self._answer_unread(shed)
        return shed is not None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        start = partial(super()._start_asgi_task, cycle, app)
        if cycle.scope["path"].startswith(HEALTH):
            start()
        else:  # while it waits it is small
            self._turns.begins.call(start)

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
        elif self._part != "head" and self._refused_unread is None and not self._inbox.has_more:
            self.transport.close()

    def give_up(self) -> None:
        """Answer no request that is not here whole: the server is stopping."""
        self._inbox.take(self._look_at)
        if self._part in {"head", "body"}:
            self._refuse(503, "the server is stopping; ask again elsewhere")

    @property
    def is_idle(self) -> bool:
        """Whether no answer is owed, as far as what was read goes."""
        return self.cycle is None or self.cycle.response_complete

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

    def timeout_keep_alive_handler(self) -> None:
        """Close, unless another request has come that only waits to be looked at."""
        timer = self.timeout_keep_alive_task
        self._inbox.take(self._look_at)
        if self.timeout_keep_alive_task is timer:
            super().timeout_keep_alive_handler()

    def _late(self, part: str) -> None:
        awaited = self._awaited
        self._inbox.take(self._look_at)  # what came in time may wait for its turn
        if self._awaited != awaited:
            return
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
        if self.is_idle and self._part == "body" and self._refused_unread is None:
            self.transport.close()  # it has its answer
            return
        if not self.is_idle:
            cycle.scope[REFUSED] = status  # type: ignore[literal-required]
            cycle.disconnected = True  # whoever reads the body need not wait
            cycle.message_event.set()
        shed = self._refused_unread
        self.transport.write(shed.answer(status, message) if shed else refusal(status, message))
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.abort)

"""HTTP server uvicorn: bounded connections, and an end that loses no request.

With ``connection.py`` the only module that knows it.
"""

import asyncio
import contextlib
import errno
import functools
import importlib.util
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from advmoe_deploy.serving.online.connection import Connection
from advmoe_deploy.serving.online.limits import Limits

# How long a thread that reads pixels may keep the event loop waiting whenever the loop needs the
# interpreter, which it does several times per answer; Python's own 5 ms make a slow health probe.
_SWITCH_S = 0.0005
# Files and sockets that are no client's connection.
_OWN_DESCRIPTORS = 128
_BACKLOG = 2048
# How long the rest of a body may take once the server stops.
_BODY_GRACE_S = 1.0
# How long a client may take to read its last answer, beyond the time that a request may wait.
_READING_S = 5.0
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_COMPLAIN_EVERY_S = 10.0

_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """A server that drains; :meth:`stop` may be called from a signal handler, or another thread."""

    def __init__(self, app: ASGIApp, limits: Limits, drain_s: float = 0.0) -> None:
        """Take ``app``; between readiness going off and the listener closing lie ``drain_s``."""
        self._limits, backlog = fitting(limits)
        self._drain_s = drain_s
        self._announced = True
        self.stopping = False
        make = functools.partial(Connection, limits=self._limits, stopping=lambda: self.stopping)
        config = uvicorn.Config(
            app,
            http=cast("Any", make),
            loop="uvloop" if importlib.util.find_spec("uvloop") else "asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="on",
            backlog=backlog,
            timeout_keep_alive=cast("Any", limits.keep_alive_s),
        )
        super().__init__(config)

    def stop(self, *, announced: bool = True) -> None:
        """Let what is under way be answered and come to an end.

        Where it is ``announced`` to others, they get their time to notice that it is not ready.
        """
        self.stopping = self.should_exit = True
        self._announced &= announced

    def abandon(self) -> None:
        """End without answering what is under way."""
        # Its report on requests that are abandoned would be a traceback each.
        logging.getLogger("uvicorn.error").disabled = True
        self.should_exit = self.force_exit = True

    def run_until_stopped(self, listener: socket.socket) -> None:
        """Serve on ``listener`` until SIGTERM, then drain and return.

        Ctrl-C drains at once, a second one does not wait; both raise KeyboardInterrupt at the end.
        """
        interrupts = 0

        def interrupt(*_: object) -> None:
            nonlocal interrupts
            interrupts += 1
            self.stop(announced=False)
            if interrupts > 1:
                self.abandon()

        handlers = {signal.SIGTERM: lambda *_: self.stop(), signal.SIGINT: interrupt}
        with _handling(handlers), _short_turns():
            self.run(sockets=[listener])
        if interrupts:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to whoever runs the server."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin, with one line instead of a flood where descriptors run out."""
        asyncio.get_running_loop().set_exception_handler(_Complaints())
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Be not ready, wait, close the listener, answer what is under way, close connections."""
        self.stopping = True
        await self._while(lambda: self._announced, self._drain_s)
        for listener in self.servers:
            listener.close()
        for sock in sockets or []:
            sock.close()
        began = time.monotonic()

        def draining() -> bool:
            late = time.monotonic() - began > _BODY_GRACE_S
            for connection in self._connections():
                connection.finish()
                if late:
                    connection.give_up()
            return bool(self.server_state.connections)

        await asyncio.sleep(0)  # what has come already is read, and so no longer idle
        await self._while(draining, self._limits.timeout_s + _READING_S)
        for connection in self._connections():
            connection.transport.abort()
        await self._while(lambda: bool(self.server_state.tasks), _READING_S)
        await self.lifespan.shutdown()

    def _connections(self) -> list[Connection]:
        return [cast("Connection", each) for each in self.server_state.connections]

    async def _while(self, condition: Any, seconds: float) -> None:
        """Wait while ``condition()`` holds, at most ``seconds``, unless there is hurry."""
        until = time.monotonic() + seconds
        while not self.force_exit and time.monotonic() < until and condition():
            for connection in self._connections():
                if not connection.is_idle:
                    connection.finish()
            await asyncio.sleep(0.02)


class _Complaints:
    """Handler of a loop's errors that says the same thing once in a while only."""

    def __init__(self) -> None:
        self._last = -_COMPLAIN_EVERY_S

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _OUT_OF_DESCRIPTORS:
            loop.default_exception_handler(context)
        elif (now := time.monotonic()) - self._last >= _COMPLAIN_EVERY_S:
            self._last = now
            _log.warning("no connection can be accepted now: %s", error.strerror)


def fitting(limits: Limits) -> tuple[Limits, int]:
    """Raise the limit of open files; return limits that it has room for, and a backlog."""
    if sys.platform == "win32":
        return limits, _BACKLOG
    import resource

    wanted = _OWN_DESCRIPTORS + limits.connections + _BACKLOG
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limits, _BACKLOG
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    room = max(16, wanted - _OWN_DESCRIPTORS)
    connections = min(limits.connections, room * 3 // 4)
    return replace(limits, connections=connections), min(_BACKLOG, room - connections)


@contextlib.contextmanager
def _handling(handlers: Mapping[signal.Signals, Callable[..., None]]) -> Iterator[None]:
    """Handle signals within the block, where that is possible at all: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    """Let threads take turns more often within the block."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)

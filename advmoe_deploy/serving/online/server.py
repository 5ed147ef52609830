"""HTTP server uvicorn: bounded connections, and an end that loses no request."""

import asyncio
import contextlib
import gc
import importlib.util
import logging
import math
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any, Protocol, cast

import uvicorn
from starlette.types import ASGIApp

from advmoe_deploy.errors import MachineError
from advmoe_deploy.serving.online.http.accept import Acceptor, Crowd, Handshakes
from advmoe_deploy.serving.online.http.connection import Connection
from advmoe_deploy.serving.online.limits import BACKLOG, Limits
from advmoe_deploy.serving.online.operations.signals import handling
from advmoe_deploy.serving.online.shedding import Shedding
from advmoe_deploy.serving.online.turns import EveryTurn, Turns

# How long a thread that reads pixels may keep the event loop waiting whenever the loop needs the
# interpreter, which it does several times per answer; Python's own 5 ms make a slow health probe.
_SWITCH_S = 0.0005
# Files and sockets that are no client's connection.
_OWN_DESCRIPTORS = 128
# How long the rest of a body may take once the server stops.
_BODY_GRACE_S = 1.0
# How long clients may take to read the last answers.
_READING_S = 5.0
# New objects until the youngest are gone through, and how often until the older ones, and all, are.
# The first two are Python's own: where more come together, each time takes longer.
_COLLECTIONS = (700, 10, 1000)
# How many pieces of what came are parsed before others have their turn.
_LOOKS = 32
# How many pieces of long bodies, of up to 256 KiB each, are read before others have their turn.
_PIECES = 4


class Beside(Protocol):
    """Another port, which begins and ends with the server."""

    async def start(self, connections: int) -> None:
        """Begin to answer on so many connections at most, or raise :class:`MachineError`."""

    def refuse(self) -> None:
        """Take nothing new."""

    async def close(self, in_hurry: Callable[[], bool]) -> None:
        """Answer what is under way, unless there is hurry, and close."""


class Server(uvicorn.Server):
    """A server that drains; :meth:`stop` may be called from a signal handler, or another thread."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        beside: Beside | None = None,
        tls: ssl.SSLContext | None = None,
        shed: Shedding = lambda _, __: None,
    ) -> None:
        """Take ``app``, and what else begins and ends with it."""
        self._shed = shed
        self._limits, self._backlog = fitting(limits, 1 if beside is None else 2)
        self._beside, self._tls = beside, tls
        self.failure: MachineError | None = None  # why it did not begin
        self._announced = True
        self._turns = EveryTurn(
            looks=Turns(_LOOKS), begins=Turns(), reads=Turns(_PIECES), ends=Turns()
        )
        self.stopping = False
        self.is_busy: Callable[[], bool] = lambda: False  # whether an answer is being made
        config = uvicorn.Config(
            app,
            http=Connection,
            loop="uvloop" if importlib.util.find_spec("uvloop") else "asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # who calls is nobody's business here
            ws="none",
            lifespan="on",
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
        with handling(handlers), _short_turns(), _own_collections():
            self.run(sockets=[listener])
        if interrupts:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to whoever runs the server."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections on ``sockets``, one or more."""
        await super().startup(sockets=[])
        most, seconds = self._limits.connections, self._limits.head_s
        handshakes = None if self._tls is None else Handshakes(self._tls, most, seconds)
        crowd = Crowd(lambda: len(self.server_state.connections), most)
        for sock in sockets or ():
            _end_unread(sock, self._limits.body_s)
        self._acceptors = [
            Acceptor(sock, self._protocol, self._backlog, handshakes, crowd)
            for sock in sockets or ()
        ]
        if self._beside is not None and self.started:
            try:
                await self._beside.start(most)
            except MachineError as error:
                self._beside, self.failure = None, error
                self.stop(announced=False)

    def _protocol(self) -> asyncio.Protocol:
        return Connection(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            limits=self._limits,
            stopping=lambda: self.stopping,
            turns=self._turns,
            shed=self._shed,
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Be not ready, wait, close the listener, answer what is under way, close connections."""
        self.stopping = True
        await self._while(lambda: self._announced, self._limits.drain_s)
        if self._beside is not None:
            self._beside.refuse()
        for acceptor in self._acceptors:
            acceptor.close()
        await self._while(self._draining(), math.inf)
        if self._beside is not None:
            await self._beside.close(lambda: self.force_exit)
        for acceptor in self._acceptors:
            acceptor.give_up()
        for connection in self._connections():
            connection.transport.abort()
        await self._while(lambda: bool(self.server_state.tasks), _READING_S)
        await self.lifespan.shutdown()

    def _draining(self) -> Callable[[], bool]:
        """Return what ends connections that owe nothing, and says whether others are left."""
        began = busy = time.monotonic()

        def draining() -> bool:
            nonlocal busy
            now = time.monotonic()
            for connection in self._connections():
                connection.finish()
                if now - began > _BODY_GRACE_S:
                    connection.give_up()
            for acceptor in self._acceptors:
                if now - began > _BODY_GRACE_S:
                    acceptor.give_up()
            if any(acceptor.beginning for acceptor in self._acceptors) or self.is_busy():
                busy = now
            return now - busy < _READING_S and (busy == now or bool(self._connections()))

        return draining

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


def _end_unread(listener: socket.socket, seconds: float) -> None:
    """Have Linux end connections of ``listener`` whose clients read nothing for so long.

    One that is to be closed waits until its last answer is read, and would wait for ever.
    """
    if sys.platform == "linux":
        milliseconds = max(1, round(1000 * seconds))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def fitting(limits: Limits, ports: int = 1) -> tuple[Limits, int]:
    """Raise the limit of open files; return limits that it has room for, and a backlog.

    Each of so many ``ports`` has the connections of the limits.
    """
    if sys.platform == "win32":
        return limits, BACKLOG
    import resource

    wanted = _OWN_DESCRIPTORS + ports * limits.connections + BACKLOG
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limits, BACKLOG
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    room = max(16, wanted - _OWN_DESCRIPTORS)
    connections = min(limits.connections, room * 3 // (4 * ports))
    return replace(limits, connections=connections), min(BACKLOG, room - ports * connections)


def collect_less() -> None:
    """Keep the collector of circles from what is there now, and from going through all too often.

    Nobody is answered meanwhile: 60 ms for what was loaded, as much for 1,500 requests that wait.
    Requests make no circles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTIONS)


@contextlib.contextmanager
def _own_collections() -> Iterator[None]:
    """Let :meth:`collect_less` hold within the block alone."""
    before = gc.get_threshold()
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    """Let threads take turns more often within the block."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)

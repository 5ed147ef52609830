"""HTTP server uvicorn, known to this module alone, set up so that no client starves others."""

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

_GRACE_S = 30
# How long a thread that reads pixels may keep the event loop waiting whenever the loop needs the
# interpreter, which it does several times per answer; Python's own 5 ms make a slow health probe.
_SWITCH_S = 0.0005
# How much of what a connection sends is parsed in one go: a body may come in chunks of one byte.
_READ_BYTES = 16 << 10


def server_of(app: ASGIApp, keep_alive: int) -> uvicorn.Server:
    """Return a server that closes a connection ``keep_alive`` seconds after its last answer."""
    config = uvicorn.Config(
        app,
        http=_SmallReads,
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=_GRACE_S,
    )
    return uvicorn.Server(config)


def run_until_stopped(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve on ``listener`` until SIGTERM (returns) or SIGINT (KeyboardInterrupt), then drain."""

    def stop(*_: object) -> None:
        # uvicorn, once drained, raises the signal again for the handler it found: this one.
        server.should_exit = True

    with _sigterm(stop), _short_turns():
        server.run(sockets=[listener])


class _SmallReads(H11Protocol):
    """HTTP/1.1 that lets other connections have their turn after ``_READ_BYTES``."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
        super().connection_made(transport)


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    """Let threads take turns more often within the block."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class _sigterm:  # noqa: N801 - used as a verb
    """Handle SIGTERM within the block, where that is possible at all: in the main thread."""

    def __init__(self, handler: Callable[..., None]) -> None:
        self._handler = handler
        self._before: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handler)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

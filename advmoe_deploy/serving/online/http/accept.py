"""Acceptance of connections: a few in each turn of the event loop, and none lost at the end.

A loop's own server accepts all that wait before it does anything else, and where descriptors run
out it says so for each of them.
"""

import asyncio
import errno
import logging
import socket
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_AT_ONCE = 16
_PAUSE_S = 1.0
_FAREWELL_S = 1.0
_CAN_HURRY = sys.version_info >= (3, 11)
_COMPLAIN_EVERY_S = 10.0
# Of a connection that has gone before it was accepted: Linux passes on what its network said.
_GONE = {
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
    errno.EPROTO,
    errno.ETIMEDOUT,
    getattr(errno, "ENONET", errno.ENETDOWN),
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Handshakes:
    """How connections become those of TLS: so many at once, in so many seconds each."""

    context: ssl.SSLContext
    most: int
    seconds: float


class Acceptor:
    """Accepts connections of a listening socket, until it is closed."""

    def __init__(
        self,
        listener: socket.socket,
        make: Callable[[], asyncio.Protocol],
        backlog: int,
        handshakes: Handshakes | None = None,
    ) -> None:
        """Begin for the running event loop; ``make`` returns the protocol of a connection."""
        self._listener, self._make, self._handshakes = listener, make, handshakes
        self._loop = asyncio.get_running_loop()
        self._beginning = set[asyncio.Task[object]]()
        self._complained = -_COMPLAIN_EVERY_S
        self._paused: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        listener.listen(backlog)
        self._resume()

    def close(self) -> None:
        """Accept who waits, and nobody any more."""
        self._loop.remove_reader(self._listener)
        self._listener.listen(0)
        while self._accept_one():
            pass
        if self._paused is not None:
            self._paused.cancel()
        self._listener.close()

    def give_up(self) -> None:
        """Close connections that have not begun."""
        for task in self._beginning:
            task.cancel()

    @property
    def beginning(self) -> bool:
        """Whether a connection was accepted that has no protocol yet."""
        return bool(self._beginning)

    def _resume(self) -> None:
        self._paused = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._accept_one():
                return

    def _accept_one(self) -> bool:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _GONE:
                return True  # others may wait behind it
            self._pause(error)  # no descriptors are left, mostly
            return False
        if self._handshakes is not None and len(self._beginning) >= self._handshakes.most:
            connection.close()
            return True
        task = self._loop.create_task(self._begin(connection))
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)
        return True

    async def _begin(self, connection: socket.socket) -> None:
        try:
            # Else an answer in two pieces waits for an acknowledgement that is sent after 40 ms.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(self._make, connection, **self._secure())
        except (OSError, asyncio.CancelledError):  # it has gone again, speaks no TLS, or is late
            connection.close()

    def _secure(self) -> dict[str, Any]:
        if self._handshakes is None:
            return {}
        secure: dict[str, Any] = {
            "ssl": self._handshakes.context,
            "ssl_handshake_timeout": self._handshakes.seconds,
        }
        # The end of a connection is told to clients that may not listen.
        return secure | ({"ssl_shutdown_timeout": _FAREWELL_S} if _CAN_HURRY else {})

    def _pause(self, error: OSError) -> None:
        self._loop.remove_reader(self._listener)
        self._paused = self._loop.call_later(_PAUSE_S, self._resume)
        if (now := time.monotonic()) - self._complained >= _COMPLAIN_EVERY_S:
            self._complained = now
            _log.warning("no connection can be accepted now: %s", error.strerror)

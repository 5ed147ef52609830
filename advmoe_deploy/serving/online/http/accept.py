"""Acceptance of connections: a few in each turn of the event loop, and none lost at the end.

A loop's own server accepts all that wait before it does anything else, and where descriptors run
out it says so for each of them.
"""

import asyncio
import contextlib
import errno
import http
import json
import logging
import socket
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_AT_ONCE = 16
# How much of an accepted connection one costs that is refused at once.
_REFUSED = 0.1
_READ = 64 << 10
# How many connections beyond the limit are read, since they may ask for the server's health.
SPARE = 128
HEALTH = "/v2/health/"
PROBES = (f"GET {HEALTH}".encode(), f"HEAD {HEALTH}".encode())
TOO_MANY = "too many connections are open; try again later"
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
    """Limits of TLS's handshakes: so many at once, in so many seconds each."""

    context: ssl.SSLContext
    most: int
    seconds: float


@dataclass(frozen=True)
class Crowd:
    """Connections beyond ``most``, where ``count`` says how many are open.

    They are told and closed before anything is made for them, unless they ask for the server's
    health: whoever looks whether a busy server lives must not take it for dead. The first of them,
    who have asked for nothing yet, are read.
    """

    count: Callable[[], int]
    most: int

    def has(self, connection: socket.socket, beginning: int) -> bool:
        """Return whether a connection, beside those that are ``beginning``, is one of them."""
        over = self.count() + beginning - self.most
        if over < 0:
            return False
        connection.setblocking(False)
        try:
            head = connection.recv(max(map(len, PROBES)), socket.MSG_PEEK)
        except BlockingIOError:
            return over >= SPARE
        except OSError:
            return True
        return not head.startswith(PROBES)


class Acceptor:
    """Accepts connections of a listening socket, until it is closed."""

    def __init__(
        self,
        listener: socket.socket,
        make: Callable[[], asyncio.Protocol],
        backlog: int,
        handshakes: Handshakes | None = None,
        crowd: Crowd | None = None,
    ) -> None:
        """Begin for the running event loop; ``make`` returns the protocol of a connection.

        A ``crowd`` is told so before a handshake, that is, where there is none.
        """
        self._listener, self._make, self._handshakes = listener, make, handshakes
        self._crowd, self._most_leaving = crowd, backlog
        self._leaving = deque[tuple[float, socket.socket]]()  # until when they may read
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
        """Close connections that have not begun, or were told to leave."""
        for task in self._beginning:
            task.cancel()
        while self._leaving:
            self._see_off()

    @property
    def beginning(self) -> bool:
        """Whether a connection was accepted that has no protocol yet, or is to read why not."""
        return bool(self._beginning or self._leaving)

    def _resume(self) -> None:
        self._paused = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        room: float = _AT_ONCE
        while room > 0 and (taken := self._accept_one()):
            room -= taken

    def _accept_one(self) -> float:
        """Accept a connection and return how much of a turn that is; 0 where none waits."""
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno in _GONE:
                return 1  # others may wait behind it
            self._pause(error)  # no descriptors are left, mostly
            return 0
        if self._handshakes is not None:
            if len(self._beginning) >= self._handshakes.most:
                connection.close()
                return 1
        elif self._crowd is not None and self._crowd.has(connection, len(self._beginning)):
            self._refuse(connection)
            return _REFUSED
        task = self._loop.create_task(self._begin(connection))
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)
        return 1

    def _refuse(self, connection: socket.socket) -> None:
        try:
            connection.send(_TOLD)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            connection.close()
            return
        if not self._leaving:
            self._loop.call_later(_FAREWELL_S, self._see_off_late)
        self._leaving.append((time.monotonic() + _FAREWELL_S, connection))
        if len(self._leaving) > self._most_leaving:
            self._see_off()

    def _see_off_late(self) -> None:
        now = time.monotonic()
        while self._leaving and self._leaving[0][0] <= now:
            self._see_off()
        if self._leaving:
            self._loop.call_later(self._leaving[0][0] - now, self._see_off_late)

    def _see_off(self) -> None:
        _, connection = self._leaving.popleft()
        with contextlib.suppress(OSError):
            connection.recv(_READ)  # what stays unread would reset it, and cost it the answer
        connection.close()

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
        if self._paused is None:  # else it was closed within the pause
            self._paused = self._loop.call_later(_PAUSE_S, self._resume)
        if (now := time.monotonic()) - self._complained >= _COMPLAIN_EVERY_S:
            self._complained = now
            _log.warning("no connection can be accepted now: %s", error.strerror)


def refusal(
    status: int, message: str, retry_s: int = 1, *, last: bool = True, own: str = ""
) -> bytes:
    """Return the text of an answer that says why a request is refused.

    If it is the ``last``, its connection ends; ``retry_s`` is for status 503, and ``own`` a line of
    the head, with its end, of this request alone.
    """
    head, body = _refusal(status, message, retry_s, last)
    return b"%b%b\r\n%b" % (head, own.encode(), body)


@lru_cache(64)  # under overload it is the same for many
def _refusal(status: int, message: str, retry_s: int, last: bool) -> tuple[bytes, bytes]:
    """Return the head, but for what is of one request alone, and the body."""
    body = json.dumps({"error": message}).encode()
    retry = f"retry-after: {retry_s}\r\n" if status == 503 else ""
    close = "connection: close\r\n" if last else ""
    head = (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n{retry}{close}"
    )
    return head.encode(), body


_TOLD = refusal(503, TOO_MANY)

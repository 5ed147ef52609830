"""Requests that would wait in vain, told so from their heads alone: the work of refusing counts.

At four times the load that a server can carry, three of four requests are refused; what is spent on
reading and parsing them is not there to compute the others.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from advmoe_deploy.serving.online.http.accept import refusal
from advmoe_deploy.serving.online.job import Times
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.operations.requests import (
    REQUEST_ID,
    Record,
    Watcher,
    record_of,
    tell,
)
from advmoe_deploy.serving.online.protocol import CLIENT_LEFT, RefusedError
from advmoe_deploy.serving.online.service import Service

_TO_INFER = re.compile(rb"/v2/models/([\w.~-]+)(?:/versions/(\d+))?/(?:infer|image)(?:\?.*)?")
# The longest body that is dropped so that its connection stays; beyond it a new one costs less.
_SHORT_BYTES = 256 << 10


class Shed:
    """A request that is refused unread, for a ``reason``; it is counted and told of at its end."""

    def __init__(
        self,
        reason: str,
        retry_s: int,
        record: Record,
        service: Service,
        watchers: Sequence[Watcher],
    ) -> None:
        """Begin; in ``retry_s`` seconds the request may be worth another try."""
        self.reason, self._retry_s, self._record = reason, retry_s, record
        self._service, self._watchers, self._ended = service, watchers, False

    def answer(self, status: int, message: str, *, last: bool = True) -> bytes:
        """End it, and return the text of its answer, the ``last`` on its connection or not."""
        self._end(status)
        own_id = f"{REQUEST_ID}: {self._record.id}\r\n"
        return refusal(status, message, self._retry_s, last=last, own=own_id)

    def leave(self) -> None:
        """End it, unless it has its answer: its client has left."""
        if not self._ended:
            self._end(CLIENT_LEFT)

    def _end(self, status: int) -> None:
        self._ended, self._record.status = True, status
        tell(self._record, self._watchers)
        self._service.metrics.request(status, self._record.seconds, Times())


class Again:
    """The last request of a connection if it was refused unread and came in one piece.

    Who is refused asks again, mostly with the same head; not to parse it again saves a third of the
    refusal.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.forget()

    def forget(self) -> None:
        """Another request begins."""
        self.is_refused, self._head, self._bytes = False, b"", 0

    def keep(self, data: bytes, body_bytes: int) -> None:
        """Take ``data`` for that request, whose body had so many bytes, if it was refused so."""
        head = data.find(b"\r\n\r\n") + 4
        if self.is_refused and data.startswith(b"POST ") and head + body_bytes == len(data):
            self._head, self._bytes = data[:head], len(data)

    def is_in(self, data: bytes) -> bool:
        """Return whether ``data`` is that request, but for its body, and nothing else."""
        return len(data) == self._bytes and data.startswith(self._head)


# Of the target and the headers of a request.
Shedding = Callable[[bytes, Sequence[tuple[bytes, bytes]]], "Shed | None"]


def shedding(models: Models, watchers: Sequence[Watcher] = ()) -> Shedding:
    """Return what says of a request, by its head, whether its model has no room."""

    def shed(target: bytes, headers: Sequence[tuple[bytes, bytes]]) -> Shed | None:
        found = _TO_INFER.fullmatch(target)
        if found is None:
            return None
        version = found[2] or b""
        try:
            service = models.find(found[1].decode(), version.decode())
        except RefusedError:
            return None  # whoever reads the request says which there are
        overload = service.overload()
        if overload is None:
            return None
        record = record_of(dict(headers))
        # Its path alone: what a query says is nobody's in a log.
        record.method, record.name, record.infers = "POST", target.partition(b"?")[0].decode(), True
        service.sign(record)
        reason = f"overloaded: {overload}"
        return Shed(reason, overload.retry_s, record, service, watchers)

    return shed


def is_short(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether the body of a request, by its headers, is so short that it may be dropped."""
    for name, value in headers:
        if name == b"content-length":
            return int(value) <= _SHORT_BYTES
    return False

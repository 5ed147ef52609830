"""Turns of the event loop, so that work in small pieces does not keep others waiting in sum."""

import asyncio
import select
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from uvicorn.protocols.http.flow_control import FlowControl

# How many requests are begun, and how many answers written, before others, health among them, have
# their turn.
_EACH = 16


class Turns:
    """Lets so many pieces of work go on in each turn of the loop; between turns it reads."""

    def __init__(self, each: int = _EACH) -> None:
        """Let ``each`` pieces go on in a turn."""
        self._each = self._left = each
        self._waiting: deque[Callable[[], object]] = deque()
        self._renewing = False

    def call(self, work: Callable[[], object]) -> None:
        """Call ``work`` in this turn if it has room, else in a later one, in order."""
        if not self._renewing:
            self._renewing = True
            asyncio.get_running_loop().call_soon(self._renew)
        if self._left and not self._waiting:
            self._left -= 1
            work()
        else:
            self._waiting.append(work)

    async def take(self) -> None:
        """Return in this turn if it has room, else in a later one, in order."""
        mine = asyncio.get_running_loop().create_future()
        self.call(partial(_free, mine))
        await mine

    def _renew(self) -> None:
        self._left = self._each
        try:
            while self._waiting and self._left:
                self._left -= 1
                self._waiting.popleft()()
        finally:  # whatever one of them raises, the others have their turns
            self._renewing = bool(self._waiting) or self._left < self._each
            if self._renewing:
                asyncio.get_running_loop().call_soon(self._renew)


@dataclass(frozen=True)
class EveryTurn:
    """Turns of a server's connections.

    Attributes:
        looks: at what came, mostly a short request each.
        begins: of requests, but for those that ask for health.
        reads: of pieces of long bodies.
        ends: of connections whose clients leave.
    """

    looks: Turns
    begins: Turns
    reads: Turns
    ends: Turns


class Flow(FlowControl):
    """Pauses and resumes what a connection reads; it goes on in its turn among others.

    Nothing is read as long as one who reads bodies wants a pause, or it is held.
    """

    def __init__(self, transport: asyncio.Transport, reads: Turns) -> None:
        super().__init__(transport)
        self.transport, self._reads = transport, reads
        self._is_held = self._is_waiting = False

    def resume_reading(self) -> None:
        """Read on, in this turn or a later one, unless there is another pause until then."""
        if self.read_paused:
            self.read_paused = False
            self._read_on()

    def hold(self) -> None:
        """Read nothing until :meth:`let_go`, whoever resumes meanwhile."""
        self._is_held = True
        self.transport.pause_reading()

    def let_go(self) -> None:
        """Read on after :meth:`hold`, if nobody else wants a pause."""
        if self._is_held:
            self._is_held = False
            self._read_on()

    def _read_on(self) -> None:
        if not self._is_waiting:
            self._is_waiting = True
            self._reads.call(self._resume)

    def _resume(self) -> None:
        self._is_waiting = False
        if not (self.read_paused or self._is_held):
            self.transport.resume_reading()


class Inbox:
    """Pieces that came on one connection and wait to be looked at, in turn with those of others."""

    def __init__(self, turns: Turns, flow: Flow) -> None:
        """Begin with nothing; no more than two pieces will wait."""
        self._turns, self._flow = turns, flow
        self._pieces: list[bytes] = []

    @property
    def has_more(self) -> bool:
        """Whether something came that was not looked at: to close now would lose it."""
        sock = self._flow.transport.get_extra_info("socket")
        if self._pieces or sys.platform == "win32" or sock is None or sock.fileno() < 0:
            return bool(self._pieces)  # such a socket has no poll()
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def put(self, data: bytes, look: Callable[[bytes], object], *, is_urgent: bool) -> None:
        """Call ``look`` with ``data`` in its turn, or now if it ``is_urgent`` and nothing is ahead.

        It is not kept longer: it belongs to the connection, and both would be a circle.
        """
        if is_urgent and not self._pieces:
            look(data)
            return
        self._pieces.append(data)
        if len(self._pieces) == 1:
            self._turns.call(partial(self.take, look))
        else:
            self._flow.hold()

    def take(self, look: Callable[[bytes], object]) -> None:
        """Call ``look`` with all that waits, if there is any."""
        if not self._pieces:
            return
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._flow.let_go()
        look(data)


def _free(waiting: "asyncio.Future[None]") -> None:
    if not waiting.done():  # cancelled, that is
        waiting.set_result(None)

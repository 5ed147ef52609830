"""Turns of the event loop, so that work in small pieces does not keep others waiting in sum."""

import asyncio
from collections import deque
from collections.abc import Callable
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


class Flow(FlowControl):
    """Pauses and resumes what a connection reads; it goes on in its turn among others."""

    def __init__(self, transport: asyncio.Transport, reads: Turns) -> None:
        super().__init__(transport)
        self._reads, self._is_waiting = reads, False

    def resume_reading(self) -> None:
        """Read on, in this turn or a later one."""
        if self.read_paused and not self._is_waiting:
            self._is_waiting = True
            self._reads.call(self._resume)

    def _resume(self) -> None:
        self._is_waiting = False
        super().resume_reading()


def _free(waiting: "asyncio.Future[None]") -> None:
    if not waiting.done():  # cancelled, that is
        waiting.set_result(None)

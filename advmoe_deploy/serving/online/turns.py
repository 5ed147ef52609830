"""Turns of the event loop, so that work in small pieces does not keep others waiting in sum."""

import asyncio
from collections import deque

# How many small requests are read before others, health among them, have their turn.
_EACH = 16


class Turns:
    """Lets so many callers go on in each turn of the loop; between turns it looks at sockets."""

    def __init__(self, each: int = _EACH) -> None:
        """Let ``each`` callers go on in a turn."""
        self._each = self._left = each
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._renewing = False

    async def take(self) -> None:
        """Return in this turn if it has room, else in a later one, in order."""
        loop = asyncio.get_running_loop()
        if not self._renewing:
            self._renewing = True
            loop.call_soon(self._renew)
        if self._left and not self._waiting:
            self._left -= 1
            return
        mine = loop.create_future()
        self._waiting.append(mine)
        await mine

    def _renew(self) -> None:
        self._left = self._each
        while self._waiting and self._left:
            waiting = self._waiting.popleft()
            if not waiting.done():  # cancelled, that is
                waiting.set_result(None)
                self._left -= 1
        self._renewing = bool(self._waiting) or self._left < self._each
        if self._renewing:
            asyncio.get_running_loop().call_soon(self._renew)

"""Turns at reading messages: how long one is stands nowhere before it has been read.

So each turn may cost the longest message there is, and there are as many turns as memory for that.
"""

import asyncio
from typing import Any

from advmoe_deploy.serving.online.protocol import NotReadyError, RefusedError

# What a slow message is given once half of the turns are taken: nobody keeps others out for long.
_PROMPT_S = 2.0
# How long a call waits for a turn, half of which end within the time above.
_TURN_S = 4.0


class Gate:
    """Reads messages of calls, so many at once; for one event loop."""

    def __init__(self, turns: int, patience_s: float) -> None:
        """Allow for ``turns``; a message may take ``patience_s`` while half of them are free."""
        self._turns, self._patience_s = turns, patience_s
        self._free = asyncio.Semaphore(turns)
        self._reading = set[asyncio.Future[Any]]()
        self._closed = False

    def close(self) -> None:
        """Read no more; whoever waits for a message, or for a turn, is refused."""
        self._closed = True
        for reading in self._reading:
            reading.cancel()

    async def read(self, context: Any) -> bytes:
        """Return the first message of a call, which is left unparsed.

        Raises:
            RefusedError: it did not come in time (408), or not at all, or there was no turn (503).
        """
        await self._enter()
        try:
            return await self._read(context)
        finally:
            self._free.release()

    async def _enter(self) -> None:
        if not self._free.locked():
            await self._free.acquire()  # at once
            return
        try:
            await asyncio.wait_for(self._free.acquire(), _TURN_S)
        except asyncio.TimeoutError:
            raise RefusedError(
                "overloaded: other messages are being read", 503, retry_s=1
            ) from None

    async def _read(self, context: Any) -> bytes:
        if self._closed:
            raise NotReadyError("the server is stopping; ask again elsewhere")
        many = 2 * (len(self._reading) + 1) > self._turns
        seconds = min(_PROMPT_S, self._patience_s) if many else self._patience_s
        reading = asyncio.ensure_future(context.read())
        self._reading.add(reading)
        try:
            done, _ = await asyncio.wait({reading}, timeout=seconds)
        finally:
            self._reading.discard(reading)
            reading.cancel()
        if not done:
            raise RefusedError(f"the message did not come within {seconds:g} s", 408)
        if reading.cancelled():
            raise NotReadyError("the server is stopping; ask again elsewhere")
        message = None if reading.exception() else reading.result()
        if not isinstance(message, bytes):
            raise RefusedError("the call has no message, or one that is too long or broken off")
        return message

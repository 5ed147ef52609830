"""Threads for work that takes long, and a bounded queue before them."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from advmoe_deploy.process import step_back
from advmoe_deploy.serving.online.protocol import ClientLeftError, RefusedError

THREADS = 2
# How much one piece of work weighs in the estimate of the pace.
_FRESH = 0.2

T = TypeVar("T")


class Workers:
    """Threads that decode image files, one after the other; for one event loop."""

    def __init__(self, most: int) -> None:
        """Let ``most`` images wait, those that are being decoded among them."""
        self._pool = ThreadPoolExecutor(THREADS, "decode", initializer=step_back)
        self._most = most
        self._pace_s = 0.0  # seconds per image
        self.waiting = 0  # those that are being decoded among them

    async def run(self, work: Callable[[], T], timeout_s: float, is_gone: Callable[[], bool]) -> T:
        """Return what ``work`` returns in one of the threads, begun within ``timeout_s``.

        Raises:
            RefusedError: it would not be, or was not (503), said no later than that.
            ClientLeftError: nobody waits for it any more.
        """
        wait_s = self.waiting / THREADS * self._pace_s
        if self.waiting >= self._most:
            reason = f"{self.waiting} images wait to be decoded, of {self._most} at most"
            raise _overloaded(reason, wait_s)
        if wait_s > timeout_s:
            raise _overloaded(f"its turn would come in {wait_s:.1f} s only", wait_s)

        # The pool keeps what is cancelled until a thread is free: without the image, that is.
        waits = [work]
        del work

        def begin() -> T:
            began = time.monotonic()
            if is_gone() or not waits:
                raise ClientLeftError
            try:
                return waits.pop()()
            finally:
                self._pace_s += _FRESH * (time.monotonic() - began - self._pace_s)

        job = self._pool.submit(begin)
        self.waiting += 1
        result = asyncio.wrap_future(job)
        try:
            done, _ = await asyncio.wait({result}, timeout=timeout_s)
            if not done and job.cancel():  # which what has begun withstands
                raise _overloaded("its time was over before its turn came", wait_s)
            return await result
        finally:
            result.cancel()
            waits.clear()
            self.waiting -= 1

    def close(self) -> None:
        """End the threads; what waits is not begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _overloaded(reason: str, wait_s: float) -> RefusedError:
    return RefusedError(f"overloaded: {reason}", 503, retry_s=max(1, round(wait_s)))

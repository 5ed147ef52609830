"""A few lanes for many threads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import LifoQueue
from threading import Lock
from typing import Generic, Protocol, TypeVar

from advmoe_deploy.errors import UsageError


class _Settles(Protocol):
    def settle(self) -> None: ...


L = TypeVar("L", bound=_Settles)


class LanePool(Generic[L]):
    """Lanes, each for one thread at a time; who finds none waits."""

    def __init__(self, lanes: Sequence[L]) -> None:
        self._count = len(lanes)
        self._is_closed = False
        self._closing = Lock()
        # After the last lane is gone, None says so to whoever still waits.
        self._free: LifoQueue[L | None] = LifoQueue()
        for lane in lanes:
            self._free.put(lane)

    @contextmanager
    def lane(self) -> Iterator[L]:
        """Lend a lane; nothing is under way on it when it comes back.

        Raises:
            UsageError: the pool is closed.
        """
        lane = None
        if not self._is_closed:
            lane = self._free.get()
            if lane is None:
                self._free.put(None)
        if lane is None:
            raise UsageError("the engine is closed; open the bundle again")
        try:
            yield lane
        finally:
            try:
                lane.settle()
            finally:
                self._free.put(lane)

    def close(self) -> None:
        """Take the lanes back as they become free, so that their owner can release them."""
        with self._closing:  # who comes second must not release what the first still waits for
            if self._is_closed:
                return
            self._is_closed = True
            for _ in range(self._count):
                self._free.get()
            self._free.put(None)

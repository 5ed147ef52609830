"""Pool of a few execution slots for many threads."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from queue import LifoQueue
from threading import Lock
from typing import Generic, Protocol, TypeVar

from advmoe_deploy.errors import UsageError


class _Settles(Protocol):
    def settle(self) -> None: ...


L = TypeVar("L", bound=_Settles)


class SlotPool(Generic[L]):
    """Execution slots, each for one thread at a time; a thread that finds none waits."""

    def __init__(self, slots: Sequence[L]) -> None:
        self._count = len(slots)
        self._is_closed = False
        self._closing = Lock()
        self._lending = Lock()
        # After the last execution slot is gone, None says so to threads that still wait.
        self._free: LifoQueue[L | None] = LifoQueue()
        for slot in slots:
            self._free.put(slot)

    @contextmanager
    def slot(self) -> Iterator[L]:
        """Lend an execution slot; nothing is under way on it when it comes back.

        Raises:
            UsageError: the pool is closed.
        """
        slot = None
        if not self._is_closed:
            slot = self._free.get()
            if slot is None:
                self._free.put(None)
        if slot is None:
            raise UsageError("the engine is closed; open the bundle again")
        try:
            yield slot
        finally:
            try:
                slot.settle()
            finally:
                self._free.put(slot)

    @contextmanager
    def every_slot(self) -> Iterator[list[L]]:
        """Lend all execution slots at once; nothing is under way on them when they come back.

        Raises:
            UsageError: the pool is closed.
        """
        with self._lending, ExitStack() as stack:  # two that each wait for the other's get none
            yield [stack.enter_context(self.slot()) for _ in range(self._count)]

    def close(self) -> None:
        """Take execution slots back as they become free, so that their owner can release them."""
        with self._closing:  # who comes second must not release what the first still waits for
            if self._is_closed:
                return
            self._is_closed = True
            with self._lending:  # who waits for all gets them or gives up, and gives back the rest
                for _ in range(self._count):
                    self._free.get()
            self._free.put(None)

"""Progress reports of long work; only the CLI draws them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """A listener for long work."""

    def start(self, task: str, total: int, done: int = 0) -> None:
        """A task of ``total`` steps begins, of which an earlier run has ``done`` some.

        One that begins before another ends is a part of it. ``OWNER: task`` is a part of what else
        its owner does, for where several work side by side.
        """

    def advance(self, task: str, steps: int = 1, **figures: float) -> None:
        """``steps`` more are done; ``figures`` are the newest values worth showing."""

    def finish(self, task: str) -> None:
        """The task is over, well or not."""

    def note(self, message: str) -> None:
        """One line worth keeping."""


class Silent:
    """A listener that ignores everything."""

    def start(self, task: str, total: int, done: int = 0) -> None:
        """Ignore."""

    def advance(self, task: str, steps: int = 1, **figures: float) -> None:
        """Ignore."""

    def finish(self, task: str) -> None:
        """Ignore."""

    def note(self, message: str) -> None:
        """Ignore."""


@contextmanager
def task(progress: Progress, name: str, total: int, done: int = 0) -> Iterator[None]:
    """Announce the task ``name`` for the length of the block."""
    progress.start(name, total, done)
    try:
        yield
    finally:
        progress.finish(name)

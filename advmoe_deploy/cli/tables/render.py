"""Rendering with rich: progress of long work on stderr, results on stdout."""

import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from advmoe_deploy.errors import printable
from advmoe_deploy.progress import Progress

_PLAIN_WIDTH = 120
_SECONDS_BETWEEN_LINES = 10.0


def draw_on(stream: TextIO, picture: RenderableType) -> None:
    """Draw ``picture`` on ``stream``, wide enough for tables where it is no terminal."""
    if stream.isatty():
        Console(file=stream, highlight=False).print(picture)
        return
    console = Console(file=io.StringIO(), width=_PLAIN_WIDTH, highlight=False)
    with console.capture() as capture:
        console.print(picture)
    stream.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Yield a listener that draws bars if stderr is a terminal and prints a few lines if not."""
    if not sys.stderr.isatty():
        yield PlainProgress(sys.stderr)
        return
    bars = RichProgress(sys.stderr)
    try:
        yield bars
    finally:
        bars.close()


class PlainProgress:
    """A listener that prints a line per task now and then."""

    def __init__(self, stream: TextIO, every: float = _SECONDS_BETWEEN_LINES) -> None:
        self._stream = stream
        self._every = every
        self._tasks: dict[str, tuple[int, int]] = {}
        self._figures: dict[str, dict[str, float]] = {}
        self._last_line = time.monotonic()
        self._last_text = ""

    def start(self, task: str, total: int) -> None:
        """Remember the task; short ones never show."""
        self._tasks[task] = (0, total)
        self._figures[task] = {}

    def advance(self, task: str, steps: int = 1, **figures: float) -> None:
        """Print where the task is, if the last line is long ago."""
        done, total = self._tasks.get(task, (0, 0))
        self._tasks[task] = (done + steps, total)
        self._figures.setdefault(task, {}).update(figures)
        if time.monotonic() - self._last_line >= self._every:
            self._print(task)

    def finish(self, task: str) -> None:
        """Print where the task ended."""
        if task in self._tasks:
            self._print(task)
            del self._tasks[task]

    def note(self, message: str) -> None:
        """Print the message."""
        self._write(printable(message))

    def _print(self, task: str) -> None:
        done, total = self._tasks[task]
        text = f"{task} {done}/{total} {_figures_text(self._figures[task])}".rstrip()
        if text != self._last_text:
            self._write(text)
        self._last_text = text
        self._last_line = time.monotonic()

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class RichProgress:
    """A listener that draws one bar per task, with its newest figures."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._figures: dict[str, dict[str, float]] = {}

    def start(self, task: str, total: int) -> None:
        """Add a bar, the first of them with the display itself."""
        if self._bars is None:
            self._bars = _new_bars(self._console)
            self._bars.start()
        self._figures[task] = {}
        self._tasks[task] = self._bars.add_task(task, total=total, figures="")

    def advance(self, task: str, steps: int = 1, **figures: float) -> None:
        """Move the bar and show the newest figures beside it."""
        if self._bars is not None and task in self._tasks:
            self._figures[task].update(figures)
            text = _figures_text(self._figures[task])
            self._bars.update(self._tasks[task], advance=steps, figures=text)

    def finish(self, task: str) -> None:
        """Leave the bar as it stands; the display ends with its last task."""
        if self._bars is not None and task in self._tasks:
            self._bars.stop_task(self._tasks.pop(task))
            if not self._tasks:
                self.close()

    def note(self, message: str) -> None:
        """Print the message above the bars."""
        self._console.print(printable(message), markup=False, highlight=False)

    def close(self) -> None:
        """End the display, whatever still runs."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def _new_bars(console: Console) -> Bars:
    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console,
    )


def _figures_text(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())

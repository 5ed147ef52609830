"""Progress of long work on stderr: bars on a terminal, a line now and then where there is none."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from advmoe_deploy.errors import printable
from advmoe_deploy.progress import Progress

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BEFORE_LOADING_SHOWS = 1.0
_WIDEST = 100  # of bars; figures take all the terminal
_LONGEST_NAME, _SHORTEST_BAR = 32, 6


@dataclass
class Running:
    """A task under way: where it stands, since when, and its newest figures."""

    name: str
    total: int
    done: float
    first: float
    since: float = field(default_factory=time.monotonic)
    figures: dict[str, float] = field(default_factory=dict)
    parts_over: int = 0  # of the step that it is at
    stepped: float = field(default_factory=time.monotonic)  # when that step began

    @property
    def owner(self) -> str:
        """The one of several side by side whose work it is: ``OWNER: task``; else empty."""
        return self.name.rpartition(": ")[0]

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.since

    @property
    def count(self) -> str:
        """Steps done of all, as wide at the first as at the last."""
        return f"{self.done:{len(str(self.total))}.0f}/{self.total}"


class Tasks:
    """The tasks that run, the outermost first; one that begins within another is a part of it."""

    def __init__(self) -> None:
        self.running: list[Running] = []

    def start(self, name: str, total: int, done: int) -> None:
        """Begin a task."""
        self.running.append(Running(name, total, done, done))

    def advance(self, name: str, steps: int, figures: dict[str, float]) -> Running | None:
        """Move a task on and return it, if it runs."""
        found = self._of(name)
        if found is not None:
            found.done = min(found.done + steps, found.total)
            if steps:
                found.parts_over, found.stepped = 0, time.monotonic()
            found.figures.update(figures)
        return found

    def finish(self, name: str) -> Running | None:
        """End a task and return it, if it ran."""
        found = self._of(name)
        if found is not None:
            whole = [each for each in self._before(found) if each.owner == found.owner]
            self.running.remove(found)
            if whole:
                whole[-1].parts_over += 1
        return found

    def is_part(self, name: str) -> bool:
        """Return whether the task belongs to one that began before it."""
        found = self._of(name)
        return found is not None and any(
            other.owner == found.owner for other in self._before(found)
        )

    def seconds_left(self, task: Running) -> float | None:
        """Return how long the rest of ``task`` takes at its pace so far, if there is a pace.

        It is never less than its part takes: the last step may be a long one.
        """
        part = self._part_of(task)
        of_part = None if part is None else self.seconds_left(part)
        if task.parts_over:
            return self._left_between_parts(task, of_part or 0.0)
        at = self._reached(task)
        gone = at - task.first
        known = [of_part, task.elapsed * (task.total - at) / gone if gone > 0 else None]
        return max((seconds for seconds in known if seconds is not None), default=None)

    def _left_between_parts(self, task: Running, of_part: float) -> float:
        """Return the same where parts of a step are over, so that the next tells no share of it.

        Whole steps tell how long one takes; before there is one, it is taken to end with its part.
        """
        at_step, gone = time.monotonic() - task.stepped, task.done - task.first
        step = (task.stepped - task.since) / gone if gone > 0 else at_step + of_part
        return max(of_part, step * (task.total - task.done) - at_step)

    def _reached(self, task: Running) -> float:
        """Return the steps done, with the share of the one that a part of ``task`` is at.

        A first part is taken for the whole step: how many follow is not known.
        """
        part = self._part_of(task)
        share = self._reached(part) / part.total if part is not None and part.total else 0.0
        return min(task.done + share, task.total)

    def _part_of(self, task: Running) -> Running | None:
        own = [other for other in self.running if other.owner == task.owner]
        behind = own[own.index(task) + 1 :] if task in own else []
        return behind[0] if behind else None

    def _before(self, task: Running) -> list[Running]:
        return self.running[: self.running.index(task)]

    def _of(self, name: str) -> Running | None:
        return next((task for task in reversed(self.running) if task.name == name), None)


class Screen(Progress, Protocol):
    """A listener that shows what it hears."""

    def pause(self) -> None:
        """Clear the display, for something else is shown; it comes back with the next step."""


@contextmanager
def shown_progress(*, loads: bool) -> Iterator[Screen]:
    """Yield a listener that draws bars if stderr is a terminal and prints a few lines if not.

    With ``loads`` the bars tell of libraries being loaded until the work begins.
    """
    if not sys.stderr.isatty():
        yield PlainProgress(sys.stderr)
        return
    bars = RichProgress(sys.stderr, loads=loads)
    try:
        yield bars
    finally:
        bars.pause()


class PlainProgress:
    """A listener that prints a line now and then, and one as each task ends."""

    def __init__(self, stream: TextIO, every: float = _SECONDS_BETWEEN_LINES) -> None:
        self._stream = stream
        self._every = every
        self._tasks = Tasks()
        self._last_line = time.monotonic()
        self._last_text = ""

    def start(self, task: str, total: int, done: int = 0) -> None:
        """Remember the task; short ones never show."""
        self._tasks.start(task, total, done)

    def advance(self, task: str, steps: int = 1, **figures: float) -> None:
        """Print where the task is, if the last line is long ago."""
        found = self._tasks.advance(task, steps, figures)
        if found and time.monotonic() - self._last_line >= self._every:
            self._write(self._line(found))

    def finish(self, task: str) -> None:
        """Print where the task ended, unless it was a part of another."""
        part = self._tasks.is_part(task)
        if (found := self._tasks.finish(task)) and not part:
            self._write(f"{found.name} {found.count.strip()} {'  '.join(_figures(found))}".rstrip())

    def note(self, message: str) -> None:
        """Print the message."""
        print(printable(message), file=self._stream, flush=True)

    def pause(self) -> None:
        """Leave what was printed."""

    def _line(self, task: Running) -> str:
        """Return where ``task`` is within those that it is a part of, and how long they take."""
        tasks = [each for each in self._tasks.running if each.owner == task.owner]
        path = ", ".join(f"{each.name} {each.count.strip()}" for each in tasks)
        left = self._tasks.seconds_left(tasks[0])
        figures = "  ".join(text for each in tasks for text in _figures(each))
        return f"{path}{'' if left is None else f', {_clock(left)} left'} {figures}".rstrip()

    def _write(self, line: str) -> None:
        if line != self._last_text:
            print(line, file=self._stream, flush=True)
        self._last_text = line
        self._last_line = time.monotonic()


class RichProgress:
    """A listener that draws a bar per task that runs, each with its newest figures below.

    Bar, count and time left stay whole at any width. What has ended leaves a line, its parts none.
    """

    def __init__(self, stream: TextIO, *, loads: bool = False) -> None:
        self._console = Console(file=stream)
        self._tasks = Tasks()
        self._live: Live | None = None
        self._loading_since: float | None = time.monotonic() if loads else None
        if loads:
            self._open()

    def start(self, task: str, total: int, done: int = 0) -> None:
        """Add a bar, the first of them with the display itself."""
        self._loading_since = None
        self._tasks.start(task, total, done)
        self._open()

    def advance(self, task: str, steps: int = 1, **figures: float) -> None:
        """Move the bar and show the newest figures."""
        if self._tasks.advance(task, steps, figures):
            self._open()

    def finish(self, task: str) -> None:
        """Leave a line of the task, unless it was a part; the display ends with the last."""
        part = self._tasks.is_part(task)
        found = self._tasks.finish(task)
        if found and not part:
            width = self._console.width
            lines = _figure_lines(found, width)
            self._console.print(Group(_bars([(found, "")], width), *lines))
        if not self._tasks.running:
            self.pause()

    def note(self, message: str) -> None:
        """Print the message above the bars."""
        self._console.print(printable(message), markup=False, highlight=False)

    def pause(self) -> None:
        """Clear the display; it comes back with the next step of a task."""
        self._loading_since = None
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _open(self) -> None:
        if self._live is None:
            self._live = Live(
                get_renderable=self._drawn,
                console=self._console,
                transient=True,
                refresh_per_second=8,
            )
            self._live.start()

    def _drawn(self) -> RenderableType:
        running = [*self._tasks.running]
        if not running:
            return self._loading()
        rows = [(task, _left(self._tasks.seconds_left(task))) for task in running]
        told = [task for task in running if task.figures]
        lines = [
            line
            for task in told
            for line in _figure_lines(task, self._console.width, named=len(told) > 1)
        ]
        return Group(_bars(rows, self._console.width), *lines)

    def _loading(self) -> RenderableType:
        if self._loading_since is None:
            return ""
        seconds = time.monotonic() - self._loading_since
        return f"loading {_clock(seconds)}" if seconds > _SECONDS_BEFORE_LOADING_SHOWS else ""


def _bars(rows: list[tuple[Running, str]], width: int) -> RenderableType:
    """Return a row per task: name, bar, count, time gone, time left; the bar takes what is over."""
    told = [(task.count, _clock(task.elapsed), left) for task, left in rows]
    taken = sum(max(map(len, column)) + 1 for column in zip(*told, strict=True)) + _SHORTEST_BAR + 1
    longest = max(len(task.name) for task, _ in rows)
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(width=max(1, min(longest, _LONGEST_NAME, width - taken)))
    table.add_column(ratio=1)
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    for (task, _), texts in zip(rows, told, strict=True):
        table.add_row(
            Text(task.name, no_wrap=True, overflow="ellipsis"),
            ProgressBar(total=task.total, completed=task.done),
            *map(Text, texts, ("progress.download", "progress.elapsed", "progress.remaining")),
        )
    return Constrain(table, min(width, _WIDEST))


def _figure_lines(task: Running, width: int, *, named: bool = False) -> list[Text]:
    """Return the figures of ``task`` in lines of at most ``width``, none of them cut in two."""
    lines, indent = [f"  {task.name}:" if named else "  "], "  "
    for text in _figures(task):
        longer = f"{lines[-1]}  {text}" if lines[-1].strip() else f"{indent}{text}"
        if len(longer) > width and lines[-1].strip():
            lines.append(f"{indent}{text}")
        else:
            lines[-1] = longer
    return [Text(line, no_wrap=True, overflow="ellipsis") for line in lines if line.strip()]


def _figures(task: Running) -> list[str]:
    # A copy, for the display draws in a thread of its own while the work adds figures.
    return [_figure(name, value) for name, value in task.figures.copy().items()]


def _figure(name: str, value: float) -> str:
    words = name.replace("_", " ").replace("pgd", "PGD")
    return f"{words} {100 * value:.1f} %" if "accuracy" in name else f"{words} {value:.4g}"


def _left(seconds: float | None) -> str:
    return "eta -:--" if seconds is None else f"eta {_clock(seconds)}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

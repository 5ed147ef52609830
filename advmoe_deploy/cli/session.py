"""Session of one command: its result on stdout, everything else on stderr."""

import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType

    from advmoe_deploy.cli.tables.progress import Screen
    from advmoe_deploy.specs import Frozen

# Whether this run has put its result on stdout: no ContextVar, for a server tells it from a task,
# which has a context of its own.
_shown = Event()
# Whether the interrupt that ended this run was the usual way to, and has been told.
_stopped: ContextVar[bool] = ContextVar("stopped", default=False)
# What makes the line on stderr of the error of this run, where that is no plain one.
_spell: ContextVar[Callable[[str], str] | None] = ContextVar("spell", default=None)
# What had been measured when the command failed.
_kept: ContextVar[Mapping[str, Any] | None] = ContextVar("kept", default=None)
# The command line of this run, without the program's own name.
_arguments: ContextVar[tuple[str, ...]] = ContextVar("arguments", default=())
# How to go on with what this run was stopped at.
_unfinished: ContextVar["_Unfinished | None"] = ContextVar("unfinished", default=None)


class _Unfinished(NamedTuple):
    """Options that a command line needs, or must not have, to go on; once there is a state."""

    more: tuple[str, ...]
    without: tuple[str, ...]
    has_state: Callable[[], bool]


class Session:
    """Output of a command, drawn for people or as one JSON object."""

    def __init__(self, stdout: TextIO, progress: "Screen", *, as_json: bool) -> None:
        self.progress = progress
        self._stdout = stdout
        self._as_json = as_json

    def show(self, value: Mapping[str, Any], draw: Callable[[], "RenderableType"]) -> None:
        """Put ``value`` on stdout as JSON if that was asked for, else what ``draw`` returns."""
        from advmoe_deploy.cli.tables.render import draw_on

        self._clear()
        if self._as_json:
            print_json(value, self._stdout)
        else:
            draw_on(self._stdout, draw())
            self._stdout.flush()
        _shown.set()  # not before: what could not be printed is followed by its error

    def write(self, text: str) -> None:
        """Put ``text`` on stdout as it is, at once."""
        self._clear()
        self._stdout.write(text)
        self._stdout.flush()

    def _clear(self) -> None:
        """Take the bars off a terminal that both streams share."""
        if self._stdout.isatty():
            self.progress.pause()

    def resumable(
        self,
        *more: str,
        without: tuple[str, ...] = (),
        has_state: Callable[[], bool] = lambda: True,
    ) -> None:
        """Have an interrupt name the command that goes on: this one with ``more``."""
        _unfinished.set(_Unfinished(more, without, has_state))

    @contextmanager
    def until_stopped(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Take an interrupt of the block, once it has shown something, for its usual end.

        ``tell`` is called with the line, and no error is printed.
        """
        try:
            yield
        except KeyboardInterrupt:
            if _shown.is_set():
                tell("stopped by Ctrl-C")
                _stopped.set(True)
            raise

    @contextmanager
    def keeping(
        self, measured: "Sequence[Frozen]", draw: Callable[[], "RenderableType"]
    ) -> Iterator[None]:
        """Lose nothing of what the block has put into ``measured`` when it fails or is stopped.

        It is drawn, or becomes ``measured`` of the one JSON object, beside the error.
        """
        try:
            yield
        except BaseException:
            if measured and self._as_json:
                _kept.set({"measured": [part.model_dump(mode="json") for part in measured]})
            elif measured:
                self.show({}, draw)
            raise


@contextmanager
def session(as_json: bool, *, loads: bool = False) -> Iterator[Session]:
    """Yield a session; what libraries print meanwhile goes to stderr.

    With ``loads`` large libraries come first, and a terminal says so until the work begins.
    """
    from advmoe_deploy.cli.tables.progress import shown_progress

    stdout = sys.stdout
    with redirect_stdout(sys.stderr), shown_progress(loads=loads) as progress:
        yield Session(stdout, progress, as_json=as_json)


def print_json(value: Mapping[str, Any], stdout: TextIO) -> None:
    """Print ``value`` as the one JSON object of this run."""
    print(json.dumps(_standard(value), indent=2, allow_nan=False), file=stdout, flush=True)
    _shown.set()


def _standard(value: Any) -> Any:
    """Return ``value`` with null for NaN and infinity, which JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _standard(item) for key, item in value.items()}
    return [_standard(item) for item in value] if isinstance(value, list | tuple) else value


def spell_errors(spell: Callable[[str], str]) -> None:
    """Have the line of the error that may end this run be what ``spell`` makes of it."""
    _spell.set(spell)


def print_error(message: str) -> None:
    """Print an error on stderr as one line."""
    spell = _spell.get() or "advmoe: error: {}".format
    print(spell(message), file=sys.stderr, flush=True)  # noqa: T201


def was_stopped() -> bool:
    """Return whether this run ended as it was meant to by an interrupt, and has said so."""
    return _stopped.get()


def print_json_error(message: str, code: int) -> None:
    """Print an error as JSON, unless this run has printed its object already."""
    if not _shown.is_set():
        print_json({"error": message, "exit_code": code, **(_kept.get() or {})}, sys.stdout)


def this_command(*more: str, without: Sequence[str] = ()) -> str:
    """Return the command line of this run, as a shell takes it, with ``more`` of single words."""
    kept = [argument for argument in _arguments.get() if argument not in without]
    return shlex.join(["advmoe", *kept, *(one for one in more if one not in kept)])


def command_that_goes_on() -> str | None:
    """Return the whole command that goes on where this run was stopped, if any does.

    Commands that can be resumed have said so by :meth:`Session.resumable`.
    """
    found = _unfinished.get()
    if found is None or not found.has_state():
        return None
    return this_command(*found.more, without=found.without)


def begin(arguments: Sequence[str]) -> None:
    """Begin a run of this command line, which has shown nothing."""
    _arguments.set(tuple(arguments))
    _shown.clear()
    _stopped.set(False)
    _unfinished.set(None)
    _spell.set(None)
    _kept.set(None)

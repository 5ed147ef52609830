"""Exit codes and messages: each exception as a number and one line."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from typer.core import TyperCommand

from advmoe_deploy.cli import INTERRUPTED
from advmoe_deploy.cli.extras import missing_package
from advmoe_deploy.errors import INTERNAL, AdvMoEError, file_error, machine_error

BROKEN_PIPE = 141

# Typer keeps its parser's exceptions to itself, save for this one and thereby its bases.
ParserError: type[Exception] = typer.BadParameter.__mro__[2]


class Command(TyperCommand):
    """A command whose parser says of each of its errors which command it is about."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse ``args`` for the context ``ctx``."""
        try:
            return super().parse_args(ctx, args)
        except ParserError as error:
            vars(error)["ctx"] = vars(error).get("ctx") or ctx
            raise


class Interrupts:
    """Record of Ctrl-C, kept even where native code made another error of it."""

    def __init__(self) -> None:
        self.came = False

    def handle(self, _: int, __: FrameType | None) -> None:
        """Note the signal and raise KeyboardInterrupt, as Python does by itself."""
        self.came = True
        raise KeyboardInterrupt


@contextmanager
def watched_interrupts() -> Iterator[Interrupts]:
    """Yield a record of Ctrl-C during the block; only the main thread can keep one."""
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = signal.signal(signal.SIGINT, interrupts.handle)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def describe(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the line for ``error``."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED, "interrupted"
    if isinstance(error, AdvMoEError):
        return error.exit_code, str(error)
    if isinstance(error, ParserError):
        _forget_hidden(error)
        return 2, _parser_message(error)
    if isinstance(error, ImportError) and (missing := missing_package(error)):
        return missing.exit_code, str(missing)
    known = file_error(error) if isinstance(error, OSError) else machine_error(error)
    if known:
        return known.exit_code, str(known)
    return (
        INTERNAL,
        f"unexpected {type(error).__name__}: {error}; --debug shows where, please report it",
    )


def _forget_hidden(error: Any) -> None:
    """Leave options that no help shows out of what the parser offers instead."""
    context = getattr(error, "ctx", None)
    if context is None or not getattr(error, "possibilities", None):
        return
    shown = {
        name
        for each in context.command.get_params(context)
        if not getattr(each, "hidden", False)
        for name in (*each.opts, *each.secondary_opts)
    }
    error.possibilities = [name for name in error.possibilities if name in shown]


def one_line(text: str) -> str:
    """Return ``text`` without line breaks."""
    return " ".join(text.split())


def _parser_message(error: Exception) -> str:
    message = str(getattr(error, "format_message", error.__str__)()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", "advmoe")
    if message.endswith("?"):
        return f"{message} See '{command} --help'"
    return f"{message}; see '{command} --help'"

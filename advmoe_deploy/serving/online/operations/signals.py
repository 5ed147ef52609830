"""Signals of a server's process, which only its main thread can handle."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager


@contextmanager
def handling(handlers: Mapping[signal.Signals, Callable[..., None]]) -> Iterator[None]:
    """Handle signals within the block, where that is possible at all: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hangups(ask: Callable[[], None]) -> AbstractContextManager[None]:
    """Call ``ask`` at each SIGHUP within the block; where the terminal has gone, end as by SIGTERM.

    A terminal that is closed sends the same signal as an operator does. Where SIGHUP was ignored
    before, as ``nohup`` has it, the terminal may go.
    """
    if not hasattr(signal, "SIGHUP"):  # Windows
        return handling({})
    stays = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    needs_terminal = not stays and _terminal_error() != errno.ENXIO

    def hung_up(*_: object) -> None:
        if needs_terminal and _terminal_error() in {errno.ENXIO, errno.EIO}:
            signal.raise_signal(signal.SIGTERM)
        else:
            ask()

    return handling({signal.SIGHUP: hung_up})


def _terminal_error() -> int | None:
    """Return why the terminal that controls the process cannot be opened, if so.

    ENXIO: there is none; EIO: it was hung up; others, such as EMFILE, say nothing of it.
    """
    if sys.platform == "win32":
        return None
    try:
        os.close(os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY))
    except OSError as error:
        return error.errno
    return None

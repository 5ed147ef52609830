"""Signals of a server's process, which only its main thread can handle."""

import os
import signal
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

    A terminal that is closed sends the same signal as an operator does.
    """
    if not hasattr(signal, "SIGHUP"):  # Windows
        return handling({})
    began_at_terminal = os.isatty(0)

    def hung_up(*_: object) -> None:
        if began_at_terminal and not os.isatty(0):
            signal.raise_signal(signal.SIGTERM)
        else:
            ask()

    return handling({signal.SIGHUP: hung_up})

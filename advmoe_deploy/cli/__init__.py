"""Command line: the command ``advmoe``."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

INTERRUPTED = 130

# Signals of other programs, which may import this, are theirs.
if Path(sys.argv[0]).stem == "advmoe" or "advmoe_deploy.cli.app" in sys.orig_argv:

    def _interrupted(*_: object) -> None:
        with suppress(OSError):  # stderr is closed
            os.write(2, b"advmoe: error: interrupted\n")
        os._exit(INTERRUPTED)

    # Ctrl-C ends the program as later, though nothing is loaded that could say so. It stays ignored
    # where a shell has it ignored, in what it runs in the background.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    if next((word for word in sys.argv[1:] if not word.startswith("-")), "") == "serve":
        # A server that is told to stop ends well at any moment. Until it serves nothing is under
        # way.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        # SIGHUP loads bundles again, and none is loaded yet. Where 'nohup' has it ignored it stays
        # so.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, lambda *_: None)

from advmoe_deploy.process import prepare  # noqa: E402, RUF100 - the signals do not wait for it

prepare()  # here, before any module of the command can load a library that reads the environment

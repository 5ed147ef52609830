"""Command line: the command ``advmoe``."""

import os
import signal
import sys

from advmoe_deploy.process import prepare

prepare()  # here, before any module of the command can load a library that reads the environment

if next((word for word in sys.argv[1:] if not word.startswith("-")), "") == "serve":
    # A server that is told to stop ends well at any moment. Until it serves, nothing is under way.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if hasattr(signal, "SIGHUP"):  # which loads bundles again, and none is loaded yet
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

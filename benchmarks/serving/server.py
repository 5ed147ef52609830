"""The server that is measured, as a process of its own."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY = r"serving '(.+)' at http://\S+:(\d+)(?: and by gRPC at \S+:(\d+))?;"
ADVMOE = [sys.executable, "-m", "advmoe_deploy.cli.app"]


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Let what starts within the block, processes and threads, run on ``cores`` alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass
class Running:
    """A server that is ready."""

    process: subprocess.Popen[bytes]
    port: int
    model: str
    log: Path
    delay_ms: float
    grpc: int | None  # its port, where there is gRPC

    @property
    def said(self) -> str:
        """What it wrote to stderr."""
        return self.log.read_text(errors="replace")


def start(bundle: Path, options: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a server; what it says goes to ``log``."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [*ADVMOE, "serve", str(bundle), "--port=0", *options],
            stdout=subprocess.DEVNULL,
            stderr=file,
        )


def ready(log: Path) -> re.Match[str] | None:
    """Return what a server has said that it is ready: its model, port and port of gRPC."""
    return re.search(READY, log.read_text())


def await_ready(process: subprocess.Popen[bytes], log: Path) -> re.Match[str]:
    """Return what a server says once it is ready.

    Raises:
        RuntimeError: it ended before.
    """
    while (found := ready(log)) is None:
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
        time.sleep(0.01)
    return found


@contextmanager
def serving(
    bundle: Path, *options: str, delay_ms: float = 2.0, cores: set[int] | None = None
) -> Iterator[Running]:
    """Serve ``bundle`` within the block, on ``cores``; SIGTERM ends it, with exit code 0."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with on_cores(cores or set()):
            process = start(bundle, [*options, f"--delay-ms={delay_ms}"], log)
        try:
            found = await_ready(process, log)
            rpc = None if found[3] is None else int(found[3])
            yield Running(process, int(found[2]), found[1], log, delay_ms, rpc)
            process.send_signal(signal.SIGTERM)
            if process.wait(timeout=120) != 0:
                raise RuntimeError(f"exit code {process.returncode}: {log.read_text()}")
        finally:
            process.kill()
            process.wait()

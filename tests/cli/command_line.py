"""A command of ``advmoe``, run here: its JSON, the one line of its error, a pipe it writes to."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from advmoe_deploy.cli.app import run

Capture = pytest.CaptureFixture[str]


def answer(capsys: Capture, *arguments: str) -> Any:
    """Run a command with --json and return its object."""
    assert run([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def said(capsys: Capture) -> str:
    """Return the one line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


@contextmanager
def read_meanwhile(pipe: Path) -> Iterator[Callable[[], bytes]]:
    """Read ``pipe`` to its end during the block; yield what returns its content afterwards.

    Held open for writing as well, it can be opened before anybody writes, and ends with the block
    even if something took its place.
    """
    held = os.open(pipe, os.O_RDWR)
    with pipe.open("rb") as stream, ThreadPoolExecutor(1) as readers:
        content = readers.submit(stream.read)
        try:
            yield lambda: content.result(timeout=60)
        finally:
            os.close(held)

"""A command of ``advmoe``, run here: its JSON, and the one line of its error."""

import json
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

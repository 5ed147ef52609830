"""Fixtures of the server's tests."""

import pytest

from tests.serving.online.live import SlowRunner


@pytest.fixture
def slow() -> SlowRunner:
    """A runner that answers at once until its ``let_go`` is cleared."""
    runner = SlowRunner()
    runner.let_go.set()
    return runner

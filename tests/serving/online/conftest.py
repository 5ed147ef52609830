"""Fixtures of the server's tests."""

from pathlib import Path

import pytest

from advmoe_deploy.bundle import Bundle, open_bundle
from tests.conftest import TINY, made_once, write_run
from tests.serving.online.live import SlowRunner


@pytest.fixture
def slow() -> SlowRunner:
    """A runner that answers at once until its ``let_go`` is cleared."""
    runner = SlowRunner()
    runner.let_go.set()
    return runner


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The export of another model of the same shape as the tiny one."""
    from advmoe_deploy.export.from_run import export_run

    def make(folder: Path) -> None:
        export_run(write_run(folder / "run", TINY, seed=1), folder / "bundle")

    return open_bundle(made_once(tmp_path_factory, "other", make) / "bundle")

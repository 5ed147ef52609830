"""The export in int8 that several files look at."""

from pathlib import Path

import pytest

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.export.from_run import export_run
from tests.conftest import made_once
from tests.export.precision.int8 import TARGETS, any_drop


@pytest.fixture(scope="session")
def bundle(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """All experts in int8, and the router where its routes agree. Read it only."""

    def make(out: Path) -> None:
        with any_drop():
            export_run(trained_run, out, targets=TARGETS)

    return open_bundle(made_once(tmp_path_factory, "int8-everywhere", make))

"""The graphs that engines are built of."""

from pathlib import Path

import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.export.from_run import export_run
from tests.export.tensorrt.cpu_builder import graphs_in


@pytest.fixture(scope="session")
def graphs(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with TensorRT's graphs in fp32 and fp16. Read it only."""
    out = tmp_path_factory.mktemp("graphs") / "bundle"
    return export_run(tiny_run, out, targets=[graphs_in("fp32"), graphs_in("fp16")])

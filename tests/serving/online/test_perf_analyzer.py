"""NVIDIA's perf_analyzer, unchanged, against a server: over HTTP and gRPC, binary and JSON.

Slow; ADVMOE_PERF_ANALYZER names the program, such as that of the wheel tritonclient 2.51.0, whose
libraries LD_LIBRARY_PATH has to lead to.
"""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle

ANALYZER = os.environ.get("ADVMOE_PERF_ANALYZER", "")
SERVE = [sys.executable, "-m", "advmoe_deploy.cli.app", "serve", "--port=0", "--grpc-port=0"]
# Three windows of so many requests, however much they differ: what is tested is that it works.
MEASURE = ["--measurement-mode=count_windows", "--measurement-request-count=50", "-r", "6"]
MEASURE += ["-s", "999", "--concurrency-range=4", "--verbose-csv"]
JSON = ["--input-tensor-format=json", "--output-tensor-format=json"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ANALYZER, reason="ADVMOE_PERF_ANALYZER names no perf_analyzer"),
]


@pytest.fixture(scope="module")
def addresses(tiny_bundle: Bundle) -> Iterator[dict[str, str]]:
    """Where a server answers, by protocol."""
    command = [*SERVE, "--drain=0", str(tiny_bundle.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        http, grpc = (process.stdout.readline().split()[1] for _ in range(2))
        yield {"http": http.removeprefix("http://").split("/")[0], "grpc": grpc}
        process.terminate()
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
    ("protocol", "options"),
    [("http", []), ("http", JSON), ("http", ["-a"]), ("grpc", []), ("grpc", ["-a"])],
    ids=["http", "http-json", "http-async", "grpc", "grpc-async"],
)
def test_it_measures(
    addresses: dict[str, str],
    tiny_bundle: Bundle,
    tmp_path: Path,
    protocol: str,
    options: list[str],
    batch: int,
) -> None:
    with np.load(tiny_bundle.file("golden.npz")) as golden:
        images = golden["images"][:16]
    data = [{"images": {"content": x.ravel().tolist(), "shape": list(x.shape)}} for x in images]
    (tmp_path / "data.json").write_text(json.dumps({"data": data}))
    where = ["-m", "advmoe", "-i", protocol, "-u", addresses[protocol], "-b", str(batch)]
    run = subprocess.run(
        [ANALYZER, *where, *options, *MEASURE, "--input-data=data.json", "-f", "found.csv"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    with (tmp_path / "found.csv").open() as file:
        (found,) = csv.DictReader(file)
    assert found["Concurrency"] == "4"
    for part in ("Inferences/Second", "Server Compute Infer", "Server Compute Input"):
        assert float(found[part]) > 0, part

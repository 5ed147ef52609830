"""``verify --images 5 --threads 1`` alone and beside a process that loads every core.

    python -m benchmarks.cpu.loaded BUNDLE [--rounds 5]

Threads that spin while they wait lose more than tenfold on a busy machine; ours sleep. The two
kinds take turns, after one call that is not counted. Writes ``benchmarks/results/loaded_cpu.json``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from advmoe_deploy.bundle import REFERENCE, open_bundle
from advmoe_deploy.errors import CheckFailedError, UndecidedError
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.runtime.onnxruntime.engine import onnxruntime_version
from advmoe_deploy.train.run.report import versions
from benchmarks.program import run_program, write

RESULT = Path(__file__).parents[1] / "results" / "loaded_cpu.json"
COMMAND = "import sys; from advmoe_deploy.cli.app import run; sys.exit(run(sys.argv[1:]))"
BUSY = "import torch\ntorch.set_num_threads({cores})\na = torch.rand(1000, 1000)\nwhile True: a @ a"


def timed(bundle: Path) -> tuple[float, dict[str, Any]]:
    """Return how long one call takes as a process of its own, and its report.

    Raises:
        CheckFailedError: it was not whole; that five images cannot tell is a whole answer, too.
    """
    options = ["--images", "5", "--threads", "1", "--json"]
    began = time.perf_counter()
    command = [sys.executable, "-c", COMMAND, "verify", str(bundle), *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode not in (0, UndecidedError.exit_code):
        raise CheckFailedError(f"verify ended with {done.returncode}: {done.stderr.strip()}")
    return seconds, json.loads(done.stdout)


def circumstances(bundle: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Return of what, on what and when it was measured."""
    manifest = open_bundle(bundle).manifest
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "model": manifest.training["recipe"]["name"],
        "weights_sha256": manifest.files[REFERENCE].sha256,
        **{name: report[name] for name in ("data", "images", "engine", "precision")},
        "threads": 1,
        "cores": os.cpu_count(),
        "processor": processor_name(),
        "versions": {**versions(), "onnxruntime": onnxruntime_version()},
    }


@contextmanager
def busy() -> Iterator[None]:
    """Load every core within the block, by one process."""
    code = BUSY.format(cores=os.cpu_count())
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        time.sleep(3)  # until it computes
        try:
            yield
        finally:
            other.kill()


def main() -> None:
    """Time both in turn, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    _, report = timed(arguments.bundle)
    alone, loaded = [], []
    for _ in range(arguments.rounds):
        alone.append(timed(arguments.bundle)[0])
        with busy():
            loaded.append(timed(arguments.bundle)[0])
        print(f"alone {alone[-1]:.1f} s, loaded {loaded[-1]:.1f} s", flush=True)
    result = {
        **circumstances(arguments.bundle, report),
        "alone_seconds": alone,
        "loaded_seconds": loaded,
        "ratio_of_medians": statistics.median(loaded) / statistics.median(alone),
    }
    write(RESULT, result)
    print(f"loaded / alone: {result['ratio_of_medians']:.2f}")


if __name__ == "__main__":
    run_program(main)

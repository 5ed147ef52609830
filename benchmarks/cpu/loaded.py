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
from pathlib import Path

from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.train.run.report import versions

RESULT = Path(__file__).parents[1] / "results" / "loaded_cpu.json"
COMMAND = "import sys; from advmoe_deploy.cli.app import run; sys.exit(run(sys.argv[1:]))"
BUSY = "import torch\ntorch.set_num_threads({cores})\na = torch.rand(1000, 1000)\nwhile True: a @ a"


def seconds_of(bundle: Path) -> float:
    """Return how long one call takes as a process of its own."""
    options = ["--images", "5", "--threads", "1", "--json"]
    began = time.perf_counter()
    command = [sys.executable, "-c", COMMAND, "verify", str(bundle), *options]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


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
    seconds_of(arguments.bundle)
    alone, loaded = [], []
    for _ in range(arguments.rounds):
        alone.append(seconds_of(arguments.bundle))
        with busy():
            loaded.append(seconds_of(arguments.bundle))
        print(f"alone {alone[-1]:.1f} s, loaded {loaded[-1]:.1f} s", flush=True)
    result = {
        "cores": os.cpu_count(),
        "processor": processor_name(),
        "versions": versions(),
        "alone_seconds": alone,
        "loaded_seconds": loaded,
        "ratio_of_medians": statistics.median(loaded) / statistics.median(alone),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"loaded / alone: {result['ratio_of_medians']:.2f}")


if __name__ == "__main__":
    main()

"""What more experts cost a single image: the same AdvMoE with 2, 5 and 10, against each other.

    python -m benchmarks.cpu.experts_count [--experts 2,5,10] [--threads 1,2] [--seconds 20]

An image takes one pathway however many there are, so its time should not grow with their number.
ResNet-18 at ratio 0.5 and 32x32, untrained, exported, one image after the other, interleaved in one
process; no thread pool spins. Ratios are to the fewest experts, with 95 % intervals.

Writes ``benchmarks/results/experts_count.json``.
"""

import argparse
import json
import os
import platform
import tempfile
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded

from advmoe_deploy.bundle import GOLDEN, Bundle
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.profiling.timing import ratio_of_medians, time_interleaved
from advmoe_deploy.runtime.select import open_runner
from benchmarks.cpu.export import IMAGES, advmoe, numbers, untrained_bundle
from benchmarks.program import run_program, write

RESULT = Path(__file__).parents[1] / "results" / "experts_count.json"


def images_of(bundle: Bundle) -> list[np.ndarray]:
    """Return the bundle's images one by one, so that every expert is visited in turn."""
    with np.load(bundle.file(GOLDEN)) as golden:
        return list(golden["images"][:, None])


def row_of(bundles: dict[int, Bundle], threads: int, seconds: float) -> dict[str, Any]:
    """Return medians in milliseconds, and ratios to the fewest experts."""
    with ExitStack() as stack:
        calls = {}
        for number, bundle in bundles.items():
            runner = stack.enter_context(open_runner(bundle, threads=threads))
            images = cycle(images_of(bundle))
            calls[str(number)] = partial(lambda run, given: run(next(given)), runner.infer, images)
        times = time_interleaved(calls, warmup=10, budget_s=seconds)
    first, *others = times
    ratios = {}
    for count in others:
        ratio = ratio_of_medians(times[count], times[first])
        ratios[f"{count} / {first}"] = [round(v, 4) for v in (ratio.value, ratio.low, ratio.high)]
    return {
        "threads": threads,
        "n": len(times[first]),
        "p50_ms": {count: round(1e3 * float(np.median(t)), 4) for count, t in times.items()},
        "ratio_low_high": ratios,
    }


def main() -> None:
    """Build, export, time, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=numbers, default=(2, 5, 10))
    parser.add_argument("--threads", type=numbers, default=(1, 2))
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring per row")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    load_before, rows = os.getloadavg(), []
    with tempfile.TemporaryDirectory() as folder:
        bundles = {
            n: untrained_bundle(Path(folder, str(n)), advmoe(n), IMAGES) for n in arguments.experts
        }
        for threads in arguments.threads:
            rows.append(row_of(bundles, threads, arguments.seconds))
            print(json.dumps(rows[-1]), flush=True)
        versions = dict(next(iter(bundles.values())).manifest.versions)
    result = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "versions": versions,
        "settings": {"batch": 1, "spinning": False, "warmup": 10},
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "rows": rows,
    }
    write(arguments.out, result)


if __name__ == "__main__":
    run_program(main)

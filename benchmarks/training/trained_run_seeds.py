"""Train the tests' own run again from other seeds, and let every test that reads it read those.

    python -m benchmarks.training.trained_run_seeds [--seeds 0,1,2] [--slow] [--runs FOLDER]

How a training ends depends on the CPU as well as on the seed: tests must hold for whatever came out
of it. Needs the development extras, in a clone of the repository. ``--runs`` keeps what is trained,
a folder a seed, and what lies there is not trained again: a mended test is soon seen. Writes
``benchmarks/results/trained_run_seeds.json`` after each seed; rows of other processors and seeds
stay.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when torch is loaded

from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import UsageError
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.reports.checkpoint import read_checkpoint
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.run.loop import train
from advmoe_deploy.train.run.report import versions
from benchmarks.cpu.export import numbers
from benchmarks.program import run_program, with_kept_rows, write

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "trained_run_seeds.json"
TRAINED_RUN = ROOT / "tests" / "data" / "trained-run"


def trained(seed: int, out: Path) -> dict[str, Any]:
    """Train from ``seed`` what tests read, unless it is in ``out``; return what was reached."""
    recipe = read_checkpoint(TRAINED_RUN / "model").recipe
    config = TrainConfig.model_validate({**recipe, "seed": seed})
    if not (out / "model").exists():
        whole = out.with_name("whole")
        train(config, load_dataset(config.data), whole, overwrite=True)
        shutil.copytree(whole / "model", out / "model")
    checkpoint = read_checkpoint(out / "model")
    return {"weights_sha256": checkpoint.weights_sha256, **checkpoint.metrics}


def tested(run: Path, processes: int, *, slow: bool) -> dict[str, Any]:
    """Return how many of the tests that read ``run`` passed, and the names of those that failed.

    Raises:
        UsageError: the tests could not be run.
    """
    results = run.parent / "results.xml"
    marked = "not gpu" if slow else "not slow and not gpu"
    chosen = ["-m", marked, f"--trained-run={run}", f"--junitxml={results}"]
    spread = ["-n", str(processes), "--dist", "loadfile", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *chosen, *spread]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not results.exists():
        told = (done.stdout + done.stderr).strip().splitlines() or ["nothing was printed"]
        raise UsageError(f"pytest ended in {done.returncode}: {told[-1]}")
    ended: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = {each.tag for each in case}
        how = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else ""
        ended[how or "passed"].append(f"{case.get('classname')}.{case.get('name')}")
    counts = {how: len(names) for how, names in ended.items()}
    return {"slow": slow, **counts, "failures": ended["failed"]}


def main() -> None:
    """Train and test each seed, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=numbers, default=tuple(range(10)))
    parser.add_argument("--slow", action="store_true", help="the tests marked so, too")
    parser.add_argument("--processes", type=int, default=1, help="that run tests")
    parser.add_argument("--runs", type=Path, help="a folder to keep trained runs in")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    facts = {"versions": versions(), "platform": platform.platform(), "threads": 1}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            run = (arguments.runs or Path(temporary)) / f"seed-{seed}" / TRAINED_RUN.name
            row = {"processor": processor_name(), "seed": seed, **trained(seed, run)}
            row |= tested(run, arguments.processes, slow=arguments.slow)
        write(arguments.out, with_kept_rows(arguments.out, facts, [row], ("processor", "seed")))
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    run_program(main)

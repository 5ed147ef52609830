"""Train the digits recipes over several seeds and write what they reach.

    python -m benchmarks.training.digits [--seeds 0,1,2] [--recipes digits-advmoe,...] [--threads 2]

Each model is measured on the 400 test images: clean, and by ``verify``'s suite ``standard``, whose
attacks go on with what stands after those before; its first is PGD-50 on the model as it runs, the
attack that papers report. Intervals are Wilson's, 95 %, over the images of one seed. Rows of an
earlier result that were not measured again are kept, with what was other then; the file is written
after each row.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advmoe_deploy.attacks.route_aware import withstanding
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.data.dataset import Dataset, to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.models.macs import macs_of
from advmoe_deploy.parity.intervals import wilson_interval
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.train.config import TrainConfig, apply_overrides
from advmoe_deploy.train.recipes import recipe
from advmoe_deploy.train.run.loop import train
from advmoe_deploy.train.run.report import versions
from advmoe_deploy.verify.suites import Suite, attack_suite
from benchmarks.program import run_program, with_kept_rows, write

RESULT = Path(__file__).parents[1] / "results" / "train_digits.json"
RECIPES = "digits-advmoe,digits-advmoe-agreeing,digits-dense,digits-s-dense,digits-at-moe"


def share(correct: np.ndarray) -> dict[str, Any]:
    """Return an accuracy with its interval and n."""
    low, high = wilson_interval(int(correct.sum()), len(correct))
    return {"share": float(correct.mean()), "low": low, "high": high, "n": len(correct)}


def row_of(
    config: TrainConfig, data: Dataset, run: Path, suite_name: Suite = "standard"
) -> dict[str, Any]:
    """Return what one recipe reaches with one seed."""
    began, cpu = time.perf_counter(), time.process_time()
    report = train(config, data, run)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    _, model = load_checkpoint(run / "model")
    x, y = torch.from_numpy(to_float(data.test.images)), torch.from_numpy(data.test.labels)
    suite = attack_suite(suite_name, model.spec)
    began = time.perf_counter()
    stands = [s.numpy() for s in withstanding(model, x, y, config.threat, suite)]
    attacking = time.perf_counter() - began
    return {
        "recipe": config.name,
        "seed": config.seed,
        "epochs": report.epochs,
        "selected_epoch": report.selected_epoch,
        "clean": share((predict(model, x) == y).numpy()),
        "pgd": share(stands[0]),
        "robust": share(stands[-1]),
        "standing_after": [
            {"attack": attack.model_dump(mode="json", exclude_defaults=True), **share(stand)}
            for attack, stand in zip(suite, stands, strict=True)
        ],
        "attack_seconds": round(attacking, 1),
        "effective_routes": report.effective_routes,
        "expert_load": next(iter(report.expert_load.values()), ()),
        "threads": torch.get_num_threads(),
        "executed_macs": macs_of(config.model).executed,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def main() -> None:
    """Train, measure, print a line per run, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recipes", default=RECIPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    configs = [
        apply_overrides(recipe(name), [f"seed={seed}"])
        for name in arguments.recipes.split(",")
        for seed in arguments.seeds.split(",")
    ]
    data, rows = load_dataset("digits"), []
    with tempfile.TemporaryDirectory() as scratch:
        for config in configs:
            rows.append(row_of(config, data, Path(scratch) / f"{config.name}-{config.seed}"))
            print(json.dumps(rows[-1]), flush=True)
            keep(arguments.out, config.threat.epsilon, rows)


def keep(path: Path, epsilon: float, rows: list[dict[str, Any]]) -> None:
    """Write ``rows``, and those of an earlier result that they do not replace."""
    facts = {
        "epsilon": epsilon,
        "suite": "standard",
        "processor": processor_name(),
        "versions": versions(),
    }
    result = with_kept_rows(path, facts, rows, ("recipe", "seed"))
    result["rows"].sort(key=lambda row: (row["recipe"], row["seed"]))
    write(path, result)


if __name__ == "__main__":
    run_program(main)

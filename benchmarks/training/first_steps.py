"""The first 100 steps of AdvMoE on real CIFAR-10: does it stay finite, and are both experts used?

    python -m benchmarks.training.first_steps --data cifar10:PATH [--threads 2] [--rows ours,paper]

The released code is NaN at step 3 with these settings (batch 128, learning rate 0.1). Two rows: the
recipe as it is, and the paper's objective without the recipe's remedies against a router that
sends everything to one expert. The load is that of 500 held-out images, model in eval mode;
BatchNorm's running statistics need some 20 steps before it means anything.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from advmoe_deploy.data.augment import to_unit
from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.plan import effective_routes
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.train.data.loader import DataLoader
from advmoe_deploy.train.recipes import apply_overrides, recipe
from advmoe_deploy.train.run.report import versions
from advmoe_deploy.train.step.weights import TrainedWeights
from benchmarks.program import named, run_program, with_kept_rows, write

RESULT = Path(__file__).parents[1] / "results" / "first_steps.json"
RECIPE = "cifar10-resnet18-advmoe"
STEPS, EVERY, IMAGES = 100, 5, 500
PAPER = ("balanced_start=false", "class_routing_weight=0", "balance_loss=null", "router_lr=0.01")
ROWS = {"ours": (), "paper": PAPER}


def row_of(name: str, data: Dataset) -> dict[str, Any]:
    """Return losses, loads and effective routes of one row."""
    config = apply_overrides(recipe(RECIPE), ROWS[name])
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    weights, loader = TrainedWeights(fabric, config), DataLoader(fabric, config, data.train)
    if config.balanced_start:
        weights.balance_start(next(loader.epoch(0)))
    held_out = to_unit(torch.from_numpy(data.holdout.images[:IMAGES]))
    losses, points, began = [], [], time.perf_counter()
    for step, batch in zip(range(1, STEPS + 1), loader.epoch(0), strict=False):
        losses.append(weights.step(batch))
        if step % EVERY == 0:
            points.append(point_of(step, weights, held_out))
            print(json.dumps({"row": name, "loss": losses[-1], **points[-1]}), flush=True)
    return {
        "row": name,
        "settings": list(ROWS[name]),
        "steps": STEPS,
        "seed": config.seed,
        "batch": config.batch_size,
        "lr": config.lr,
        "router_lr": config.router_lr,
        "finite": all(math.isfinite(loss) for loss in losses),
        "losses": [round(loss, 4) for loss in losses],
        "points": points,
        "seconds": round(time.perf_counter() - began, 1),
    }


def point_of(step: int, weights: TrainedWeights, images: torch.Tensor) -> dict[str, Any]:
    """Return the use of the experts after ``step``."""
    model = weights.learner.model
    model.eval()
    with torch.no_grad():
        routing = model.route(images)["router"]
    model.train()
    load = tuple(routing.expert_load_E.tolist())
    return {"step": step, "effective_routes": round(effective_routes(load), 4), "load": load}


def main() -> None:
    """Run the rows, print a line now and then, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--rows", default="ours,paper")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = named("row", arguments.rows, ROWS)
    data = load_dataset(arguments.data)
    rows = [row_of(name, data) for name in names]
    facts = {
        "recipe": RECIPE,
        "threads": arguments.threads,
        "processor": processor_name(),
        "versions": versions(),
    }
    write(arguments.out, with_kept_rows(arguments.out, facts, rows, ("row",)))


if __name__ == "__main__":
    run_program(main)

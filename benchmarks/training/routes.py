"""What makes routes a weapon, and what does not: parts of the recipe of agreeing experts.

    python -m benchmarks.training.routes [--seed 0] [--threads 1] [--only NAME,...]

Every variant trains ``digits-advmoe-agreeing`` with some of its parts switched off, or others on,
and is attacked by ``verify``'s suite ``quick`` on the 400 test images. ``other_right`` is the share
of clean images that the pathways not chosen get right as well. Writes
``benchmarks/results/routes_digits.json`` after each row; rows that were not measured again stay.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from advmoe_deploy.data.dataset import Dataset, to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.train.config import apply_overrides
from advmoe_deploy.train.recipes import recipe
from advmoe_deploy.train.run.report import versions
from benchmarks.program import named, run_program, with_kept_rows, write
from benchmarks.training.digits import row_of

RESULT = Path(__file__).parents[1] / "results" / "routes_digits.json"
RECIPE = "digits-advmoe-agreeing"

NO_START, NO_CHANCE, NO_STABILITY = "shared_start=0", "random_routes=0", "route_stability=0"
VARIANTS: dict[str, tuple[str, ...]] = {
    "all three": (),
    "shared start alone": (NO_CHANCE, NO_STABILITY),
    "random routes alone": (NO_START, NO_STABILITY),
    "stable scores alone": (NO_START, NO_CHANCE),
    "no shared start": (NO_START,),
    "no random routes": (NO_CHANCE,),
    "no stable scores": (NO_STABILITY,),
    "even loads alone": (NO_START, NO_CHANCE, NO_STABILITY),
    "half of the routes random": ("random_routes=0.5",),
    "all three and classes kept together": ("class_routing_weight=20",),
    "parted after 6 epochs of 24": ("shared_start=0.25",),
    "parted after 18 epochs of 24": ("shared_start=0.75",),
}


def measured(name: str, seed: int, data: Dataset, run: Path) -> dict[str, Any]:
    """Return the row of one variant."""
    settings = VARIANTS[name]
    config = apply_overrides(recipe(RECIPE), [*settings, f"seed={seed}"])
    row = row_of(config, data, run, "quick")
    _, model = load_checkpoint(run / "model")
    x, y = torch.from_numpy(to_float(data.test.images)), torch.from_numpy(data.test.labels)
    with torch.no_grad():
        chosen = model.route(x)[model.rules[0].layer].expert_ids_NK[:, 0]
        right = [model(x, model.forced(e)).argmax(dim=1) == y for e in range(2)]
    other = torch.where(chosen == 0, right[1], right[0])
    wanted = ("clean", "pgd", "robust", "effective_routes", "expert_load", "cpu_seconds")
    return {
        "variant": name,
        "settings": settings,
        "seed": seed,
        **{key: row[key] for key in wanted},
        "pathways": [float(r.float().mean()) for r in right],
        "other_right": float(other.float().mean()),
    }


def keep(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``rows``, and those of an earlier result that they do not replace."""
    facts = {
        "recipe": RECIPE,
        "suite": "quick",
        "processor": processor_name(),
        "versions": versions(),
    }
    result, order = with_kept_rows(path, facts, rows, ("variant", "seed")), [*VARIANTS]
    result["rows"].sort(key=lambda row: (order.index(row["variant"]), row["seed"]))
    write(path, result)


def main() -> None:
    """Train and attack each variant, print a line, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = named("variant", arguments.only, VARIANTS)
    data, rows = load_dataset("digits"), []
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            rows.append(measured(name, arguments.seed, data, Path(scratch) / name))
            print(json.dumps(rows[-1]), flush=True)
            keep(arguments.out, rows)


if __name__ == "__main__":
    run_program(main)

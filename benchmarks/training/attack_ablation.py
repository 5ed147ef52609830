"""Each part of the attack on routes, alone, on one run's test images.

    python -m benchmarks.training.attack_ablation RUN [--threads 2]

Every row attacks all images that are right when clean; ``union`` rows are what is left by all rows
so far. Writes ``benchmarks/results/robustness/attack_ablation.json``.
"""

import argparse
import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from advmoe_deploy.attacks.route_aware import withstanding
from advmoe_deploy.attacks.scene import Scene
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_test_split
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.models.stored import threat_or
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.specs import AttackSpec
from advmoe_deploy.train.run.report import versions
from benchmarks.program import run_program, write
from benchmarks.training.digits import share

RESULT = Path(__file__).parents[1] / "results/robustness" / "attack_ablation.json"

PGD = AttackSpec(name="pgd", steps=50)
PATHWAY = AttackSpec(name="pgd", steps=20, target="pathway")
SETTLING = {"loss": "margin", "momentum": 0.75, "decay": True}


def endless_error() -> AbstractContextManager[Any]:
    """Let the error of a pathway go on growing after it is there."""
    return mock.patch.object(Scene, "error_goal", property(lambda _: math.inf))


def variants() -> list[tuple[str, AttackSpec, AbstractContextManager[Any]]]:
    """Return the name of each row, its attack, and what is switched off for it."""

    def of(base: AttackSpec, **how: Any) -> AttackSpec:
        return base.model_copy(update=how)

    def soft(temperature: float) -> AttackSpec:
        return of(PGD, target="soft", temperature=temperature, **SETTLING)

    return [
        ("PGD-50 on the model", PGD, nullcontext()),
        ("the same, class margin, momentum, falling step", of(PGD, **SETTLING), nullcontext()),
        ("straight-through", of(PGD, target="straight-through"), nullcontext()),
        ("pathways, an error that grows on", PATHWAY, endless_error()),
        ("pathways, a goal that is reached rests", PATHWAY, nullcontext()),
        ("and a step that falls from epsilon", of(PATHWAY, decay=True), nullcontext()),
        ("and momentum", of(PATHWAY, decay=True, momentum=0.75), nullcontext()),
        ("and 50 steps", of(PATHWAY, **SETTLING | {"steps": 50}), nullcontext()),
        ("the weakest pathway alone", of(PATHWAY, target="weakest", **SETTLING), nullcontext()),
        *((f"soft form, temperature {t:g}", soft(t), nullcontext()) for t in (0.1, 0.5, 2.0)),
        ("pathways at nine classes", of(PATHWAY, classes=9, **SETTLING), nullcontext()),
    ]


def main() -> None:
    """Attack, print a line per row, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkpoint, model = load_checkpoint(arguments.run / "model")
    threat = threat_or(None, checkpoint.threat, arguments.run)
    test = load_test_split(str(checkpoint.provenance["data"]))
    x, y = torch.from_numpy(to_float(test.images)), torch.from_numpy(test.labels)
    rows, union = [], torch.ones(len(y), dtype=torch.bool)
    for name, attack, off in variants():
        began = time.perf_counter()
        with off:
            (stands,) = withstanding(model, x, y, threat, [attack])
        union &= stands
        row = {
            "variant": name,
            "attack": attack.model_dump(mode="json", exclude_defaults=True),
            "robust": share(stands.numpy()),
            "union": share(union.numpy()),
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    result = {
        "recipe": checkpoint.recipe.get("name"),
        "seed": checkpoint.recipe.get("seed"),
        "weights_sha256": checkpoint.weights_sha256,
        "epsilon": threat.epsilon,
        "threads": arguments.threads,
        "processor": processor_name(),
        "versions": versions(),
        "rows": rows,
    }
    write(arguments.out, result)


if __name__ == "__main__":
    run_program(main)

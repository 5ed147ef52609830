"""Measure a run on CIFAR-10's test images: clean, PGD-50, AutoAttack, attacks on its routes.

    python -m benchmarks.training.cifar10 RUN --data cifar10:PATH [--images 1000] [--threads 2]

Clean accuracy is of all test images, the rest of the first ``--images``. AutoAttack is the
standard four, of a routed model in its straight-through form; ``robust`` is what stands after
PGD-50, AutoAttack and then the attacks of ``verify``'s suite ``standard``, each image for itself.
Images are attacked by the chunk and kept in RUN/attacked.npz after each, so that the program may be
stopped at any time, goes on where it was, and writes ``benchmarks/results/cifar10/RECIPE.json`` as
it goes. AutoAttack takes about a minute of one core for every image that stands.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.route_aware import withstanding
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.files import write_atomically
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import Checkpoint, load_checkpoint
from advmoe_deploy.models.macs import macs_of
from advmoe_deploy.models.routing.routing import effective_routes
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.specs import AttackSpec, ThreatModel
from advmoe_deploy.train.run.report import versions
from advmoe_deploy.verify.suites import attack_suite
from benchmarks.training.digits import share

RESULTS = Path(__file__).parents[1] / "results" / "cifar10"
PGD = AttackSpec(name="pgd", steps=50)
CHUNK = 125
AUTOATTACK = AttackSpec(name="autoattack")
FLAGS = ("clean", "pgd", "autoattack", "other_right")
ROUTES = ("clean_route", "attacked_route")


@dataclass
class Attacked:
    """Flags and routes of the images that were attacked so far, and the seconds it took.

    ``standing`` is [images][attacks]: what stands after each of :func:`sequence`.
    """

    columns: dict[str, NDArray[Any]]
    seconds: float

    @classmethod
    def read(cls, path: Path, attacks: int) -> "Attacked":
        """Return what an earlier call left, or nothing yet."""
        if not path.exists():
            columns = {n: np.zeros(0, bool) for n in FLAGS}
            columns |= {n: np.zeros(0, np.int64) for n in ROUTES}
            return cls(columns | {"standing": np.zeros((0, attacks), bool)}, 0.0)
        with np.load(path, allow_pickle=False) as kept:
            return cls({n: kept[n] for n in (*FLAGS, *ROUTES, "standing")}, float(kept["seconds"]))

    def with_chunk(self, chunk: dict[str, NDArray[Any]], seconds: float) -> "Attacked":
        """Return this with another chunk behind it."""
        columns = {n: np.concatenate([c, chunk[n]]) for n, c in self.columns.items()}
        return Attacked(columns, self.seconds + seconds)

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, seconds=self.seconds, **self.columns)  # type: ignore[arg-type]
        partial.replace(path)


def sequence(model: Classifier) -> list[AttackSpec]:
    """Return the attacks whose joint survivors are the worst case, in order."""
    routed = attack_suite("standard", model.spec)[1:] if model.rules else ()  # its first is PGD-50
    return [PGD, AUTOATTACK, *routed]


def attack_chunk(
    model: Classifier, x: Tensor, y: Tensor, threat: ThreatModel
) -> dict[str, NDArray[Any]]:
    """Return the columns of one chunk of float images [N, C, H, W]."""
    clean = predict(model, x) == y
    autoattack, found = clean.clone(), x.clone()
    rows = clean.nonzero()[:, 0]
    found[rows] = find_adversarial(model, x[rows], y[rows], threat, AUTOATTACK)
    autoattack[rows] = predict(model, found[rows]) == y[rows]
    (pgd,) = withstanding(model, x, y, threat, [PGD])
    left = (pgd & autoattack).nonzero()[:, 0]
    others = withstanding(model, x[left], y[left], threat, sequence(model)[2:])
    later = [torch.zeros_like(pgd).index_fill_(0, left[stand], value=True) for stand in others]
    flags = {"clean": clean, "pgd": pgd, "autoattack": autoattack}
    flags["standing"] = torch.stack([pgd, pgd & autoattack, *later], dim=1)
    return {n: f.numpy() for n, f in flags.items()} | routes_of(model, x, found, y)


@torch.no_grad()
def routes_of(model: Classifier, x: Tensor, found: Tensor, y: Tensor) -> dict[str, NDArray[Any]]:
    """Return each image's expert, clean and attacked, and whether the others are all right, too."""
    if not model.rules:
        none = np.zeros(len(x), np.int64)
        return {"clean_route": none, "attacked_route": none, "other_right": none == 0}
    layer = model.rules[0].layer
    before, after = (model.route(images)[layer].expert_ids_NK[:, 0] for images in (x, found))
    right = torch.ones_like(y, dtype=torch.bool)
    for expert in range(model.spec.num_experts):
        answer = model(x, model.forced(expert)).argmax(dim=1)
        right &= (answer == y) | (before == expert)
    names = zip((*ROUTES, "other_right"), (before, after, right), strict=True)
    return {name: values.numpy() for name, values in names}


def result_of(
    checkpoint: Checkpoint,
    model: Classifier,
    clean: NDArray[np.bool_],
    attacked: Attacked,
    run: Path,
) -> dict[str, Any]:
    """Return everything that is known of the run by now."""
    columns = attacked.columns
    report = json.loads((run / "report.json").read_text())
    standing = [
        {"attack": attack.model_dump(mode="json", exclude_defaults=True), **share(stand)}
        for attack, stand in zip(sequence(model), columns["standing"].T, strict=True)
    ]
    result = {
        "recipe": checkpoint.recipe["name"],
        "seed": checkpoint.recipe["seed"],
        "weights_sha256": checkpoint.weights_sha256,
        "settings": checkpoint.recipe,
        "test_images": len(clean),
        "epsilon": checkpoint.threat.epsilon if checkpoint.threat else None,
        "selected_epoch": report["selected_epoch"],
        "clean": share(clean),
        "pgd_50": share(columns["pgd"]),
        "autoattack": share(columns["autoattack"]),
        "robust": share(columns["standing"][:, -1]),
        "standing_after": standing,
        "macs": macs_of(model.spec).model_dump(),
        "train_seconds": report["seconds"],
        "attack_seconds": round(attacked.seconds, 1),
    }
    if model.rules:
        experts = model.spec.num_experts
        clean_ids, attacked_ids = columns["clean_route"], columns["attacked_route"]
        result["routes"] = {
            "clean": effective_routes(tuple(np.bincount(clean_ids, minlength=experts).tolist())),
            "attacked": effective_routes(
                tuple(np.bincount(attacked_ids, minlength=experts).tolist())
            ),
            "flipped_by_autoattack": share(clean_ids != attacked_ids),
            "right_by_every_other_pathway": share(columns["other_right"]),
        }
    where = {"processor": processor_name(), "versions": versions()}
    return {"epsilon": result["epsilon"], **where, "rows": [result]}


def main() -> None:
    """Attack what is left, print a line per chunk, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkpoint, model = load_checkpoint(arguments.run / "model")
    assert checkpoint.threat is not None
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    test = load_dataset(arguments.data).test
    x, y = torch.from_numpy(to_float(test.images)), torch.from_numpy(test.labels)
    clean = (predict(model, x) == y).numpy()
    state = arguments.run / "attacked.npz"
    attacked = Attacked.read(state, len(sequence(model)))
    out = arguments.out / f"{checkpoint.recipe['name']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    while (done := len(attacked.columns["clean"])) < arguments.images:
        began = time.perf_counter()
        rows = slice(done, min(done + CHUNK, arguments.images))
        chunk = attack_chunk(model, x[rows], y[rows], checkpoint.threat)
        attacked = attacked.with_chunk(chunk, time.perf_counter() - began)
        attacked.write(state)
        result = result_of(arguments.run, checkpoint, model, clean, attacked)
        write_atomically(out, (json.dumps(result, indent=2) + "\n").encode())
        told = {name: round(float(attacked.columns[name].mean()), 4) for name in FLAGS}
        told["worst"] = round(float(attacked.columns["standing"][:, -1].mean()), 4)
        print(json.dumps({"images": rows.stop, **told}), flush=True)


if __name__ == "__main__":
    main()

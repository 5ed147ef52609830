"""Measure a run on CIFAR-10's test images: clean, PGD-50, AutoAttack, attacks on its routes.

    python -m benchmarks.training.cifar10 RUN|zoo:NAME --data cifar10:PATH [--images 1000]

Clean accuracy is of all test images, the rest of the first ``--images``. AutoAttack is its four
attacks one after the other, each on what the one before it left; ``robust`` is what stands after
these and after PGD-50 and the attacks of ``verify``'s suite ``standard``, image by image. Cheap
attacks come first, each takes the images by the chunk, and RECIPE.attacked.json in
``benchmarks/results/cifar10`` is written after each: the program may be stopped at any time, goes
on where it was, on any machine, and writes RECIPE.json there after every attack. FAB-T and Square
of AutoAttack take most of a minute of one core for every image that stands.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_test_split
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import Checkpoint, load_checkpoint
from advmoe_deploy.models.macs import macs_of
from advmoe_deploy.plan import effective_routes
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.specs import AttackSpec, ThreatModel
from advmoe_deploy.train.run.report import versions
from advmoe_deploy.verify.suites import attack_suite
from advmoe_deploy.zoo.resolve import resolve
from benchmarks.program import run_program, write
from benchmarks.training.digits import share

RESULTS = Path(__file__).parents[1] / "results" / "cifar10"
CHUNK = 125
PGD = AttackSpec(name="pgd", steps=50)
THROUGH_ROUTER = AttackSpec(name="pgd", target="straight-through", steps=50)
Flags = NDArray[np.bool_]
Turn = Callable[[AttackSpec, NDArray[np.int64]], Flags]


# AutoAttack's standard four as attacks of their own, on the model as it runs.
AUTOATTACK = (
    AttackSpec(name="apgd", steps=100),
    AttackSpec(name="apgd-t", steps=100),
    AttackSpec(name="fab-t", steps=100),
    AttackSpec(name="square", steps=5000),
)


def sequence(model: Classifier) -> list[AttackSpec]:
    """Return all attacks in the order in which they run."""
    apgd, apgd_t, *slow = AUTOATTACK
    routed = attack_suite("standard", model.spec)[1:] if model.rules else ()  # its first is PGD-50
    return [PGD, apgd, apgd_t, *routed, *slow]


def key_of(attack: AttackSpec) -> str:
    """Return the name under which an attack's flags are kept."""
    return attack.model_dump_json(exclude_defaults=True)


def digits_of(flags: Flags) -> str:
    """Return flags as digits."""
    return "".join("01"[flag] for flag in flags.tolist())


def flags_of(digits: str) -> Flags:
    """Return what :func:`digits_of` wrote."""
    return np.array([digit == "1" for digit in digits], bool)


class Standing:
    """What each attack left of the images it has seen: flags by attack, kept in a file.

    A flag is true where the image was right and the attack did not turn it, or did not get it since
    another had turned it before. The file holds them as digits, an image each.
    """

    def __init__(self, path: Path, weights: str, clean: Flags) -> None:
        self.path, self.weights, self.clean = path, weights, clean
        self.flags: dict[str, Flags] = {}
        self.seconds = 0.0
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["weights_sha256"] != weights:
                raise UsageError(f"{path} is of other weights; remove it to attack these")
            self.seconds = kept["seconds"]
            self.flags = {key: flags_of(digits) for key, digits in kept["standing"].items()}

    def of(self, attack: AttackSpec) -> Flags:
        """Return the flags of the images that ``attack`` has seen."""
        return self.flags.get(key_of(attack), np.zeros(0, bool))

    def after(self, attacks: Iterable[AttackSpec], rows: slice) -> Flags:
        """Return which of ``rows`` are right and stand after those ``attacks`` that saw them."""
        standing = self.clean[rows].copy()
        for attack in attacks:
            flags = self.of(attack)[rows]
            standing[: len(flags)] &= flags
        return standing

    def add(self, attack: AttackSpec, flags: Flags, seconds: float) -> None:
        """Append a chunk to the flags of ``attack`` and write the file whole or not at all."""
        self.flags[key_of(attack)] = np.concatenate([self.of(attack), flags])
        self.seconds += seconds
        kept = {
            "weights_sha256": self.weights,
            "seconds": self.seconds,
            "clean": digits_of(self.clean),
            "standing": {key: digits_of(flags) for key, flags in self.flags.items()},
        }
        write(self.path, kept)


def turner(model: Classifier, x: Tensor, y: Tensor, threat: ThreatModel) -> Turn:
    """Return what runs an attack on rows of the float images and says which of them stand."""

    def turn(attack: AttackSpec, rows: NDArray[np.int64]) -> Flags:
        images, labels = x[rows], y[rows]
        found = find_adversarial(model, images, labels, threat, attack, first_only=True)
        return (predict(model, found) == labels).numpy()

    return turn


def attack_all(
    turn: Turn,
    model: Classifier,
    standing: Standing,
    images: int,
) -> Iterable[tuple[AttackSpec, int]]:
    """Run every attack on what stands, ``turn`` saying which rows still do; yield each chunk."""
    for attack in sequence(model):
        while (done := len(standing.of(attack))) < images:
            began = time.perf_counter()
            rows = slice(done, min(done + CHUNK, images))
            # AutoAttack gets what its own attacks left, so that it is a figure of its own.
            before = standing.after(AUTOATTACK if attack in AUTOATTACK else sequence(model), rows)
            left = np.flatnonzero(before)
            flags = np.ones(len(before), bool)
            flags[left] = turn(attack, left + done)
            standing.add(attack, flags, time.perf_counter() - began)
            yield attack, rows.stop


@torch.no_grad()
def routes_of(model: Classifier, x: Tensor, y: Tensor, threat: ThreatModel) -> dict[str, Any]:
    """Return how the router treats clean images and those that attack the model through it."""
    experts, layer = model.spec.num_experts, model.rules[0].layer
    with torch.enable_grad():
        attacked = find_adversarial(model, x, y, threat, THROUGH_ROUTER)
    before, after = (model.route(images)[layer].expert_ids_NK[:, 0] for images in (x, attacked))
    right = torch.ones_like(y, dtype=torch.bool)
    for expert in range(experts):
        right &= (model(x, model.forced(expert)).argmax(dim=1) == y) | (before == expert)

    def used(ids: Tensor) -> float:
        return effective_routes(tuple(ids.bincount(minlength=experts).tolist()))

    found = {
        "clean": used(before),
        "attacked": used(after),
        "flipped": share((before != after).numpy()),
        "right_by_every_other_pathway": share(right.numpy()),
    }
    return {"routes": found}


def row_in(file: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the row that an earlier call wrote of the same training, or nothing."""
    if not file.exists():
        return {}
    (row,) = json.loads(file.read_text())["rows"]
    return row if row["settings"] == _settings(checkpoint) else {}


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    return checkpoint.recipe | {"data": checkpoint.recipe["data"].partition(":")[0]}


def known_routes(earlier: dict[str, Any], weights: str, images: int) -> dict[str, Any]:
    """Return the routes that an earlier call measured of these weights and as many images."""
    same = earlier and earlier["weights_sha256"] == weights and earlier["pgd_50"]["n"] == images
    return {"routes": earlier["routes"]} if same else {}


def trained(run: Path, earlier: dict[str, Any]) -> dict[str, Any]:
    """Return epoch and time of the training; a model of the zoo travels without its report."""
    if (run / "report.json").exists():
        report = json.loads((run / "report.json").read_text())
        return {"selected_epoch": report["selected_epoch"], "train_seconds": report["seconds"]}
    return {key: earlier.get(key) for key in ("selected_epoch", "train_seconds")}


def result_of(checkpoint: Checkpoint, model: Classifier, standing: Standing) -> dict[str, Any]:
    """Return what is known of the run by now: by attacks that have seen all of PGD's images."""
    images = len(standing.of(PGD))
    done = [attack for attack in sequence(model) if len(standing.of(attack)) == images]

    def after(attacks: Iterable[AttackSpec]) -> dict[str, Any]:
        return share(standing.after(attacks, slice(images)))

    steps = [
        {"attack": attack.model_dump(mode="json", exclude_defaults=True), **after(done[: i + 1])}
        for i, attack in enumerate(done)
    ]
    return {
        "recipe": checkpoint.recipe["name"],
        "seed": checkpoint.recipe["seed"],
        "weights_sha256": checkpoint.weights_sha256,
        "settings": _settings(checkpoint),
        "test_images": len(standing.clean),
        "epsilon": checkpoint.threat.epsilon if checkpoint.threat else None,
        "clean": share(standing.clean),
        "pgd_50": after([PGD]),
        "autoattack": after(AUTOATTACK) if set(AUTOATTACK) <= set(done) else None,
        "autoattack_so_far": after(AUTOATTACK) | {"by": [a.name for a in AUTOATTACK if a in done]},
        "robust": after(done),
        "attacks_left": [key_of(attack) for attack in sequence(model) if attack not in done],
        "standing_after": steps,
        "macs": macs_of(model.spec).model_dump(),
        "attack_seconds": round(standing.seconds, 1),
    }


def main() -> None:
    """Attack what is left, print a line per chunk, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run, or zoo:NAME")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = resolve(arguments.run)
    checkpoint, model = load_checkpoint(run / "model")
    if checkpoint.threat is None or "name" not in checkpoint.recipe:
        raise UsageError(f"{arguments.run} says no recipe or no radius; name a run of ours")
    model = model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    test = load_test_split(arguments.data, checkpoint.decoding)
    x, y = torch.from_numpy(to_float(test.images)), torch.from_numpy(test.labels)
    clean = (predict(model, x) == y).numpy()
    out = arguments.out / f"{checkpoint.recipe['name']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    standing = Standing(out.with_suffix(".attacked.json"), checkpoint.weights_sha256, clean)
    require_images(arguments.images, len(clean), attacked := len(standing.of(PGD)))
    earlier = row_in(out, checkpoint)
    facts = trained(run, earlier)
    if model.rules:
        first = slice(arguments.images)
        facts |= known_routes(earlier, checkpoint.weights_sha256, arguments.images) or routes_of(
            model, x[first], y[first], checkpoint.threat
        )
    if attacked == arguments.images:
        write_row(out, result_of(checkpoint, model, standing) | facts)
    turn = turner(model, x, y, checkpoint.threat)
    for attack, images in attack_all(turn, model, standing, arguments.images):
        print(json.dumps({"attack": key_of(attack), "images": images}), flush=True)
        if images == arguments.images:
            write_row(out, result_of(checkpoint, model, standing) | facts)


def require_images(asked: int, there: int, attacked: int) -> None:
    """Refuse more images than there are, and fewer than an earlier call began to attack.

    Raises:
        UsageError: ``asked`` is no such number.
    """
    least = max(1, attacked)
    if not least <= asked <= there:
        raise UsageError(f"--images {asked} is not possible here; ask for {least} to {there}")


def write_row(out: Path, row: dict[str, Any]) -> None:
    """Write what is known by now, and print its figures."""
    result = {
        "epsilon": row["epsilon"],
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "rows": [row],
    }
    write(out, result)
    told = {n: row[n]["share"] for n in ("pgd_50", "autoattack_so_far", "robust")}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    run_program(main)

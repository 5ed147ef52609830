"""Our attacks beside others' code: the same torch model, the same images, the accuracy each leaves.

    python -m benchmarks.training.pyautoattack_agreement --run RUN [--data cifar10:PATH]
        [--images 512] [--attacks pgd,apgd,apgd-t,square,autoattack] [--threads 2]
        [--keep FOLDER [--side ours|theirs]]

``ours`` goes through ``find_adversarial``. ``theirs`` is, for ``pgd``, a PGD written below on
nothing but torch, and for the others pyautoattack, called on a plain function of the model. What is
seeded alike and cut into the same batches should agree to the image; PGD draws other starts from
the second batch on and may differ by a few. Both sides' images are judged by the code below, which
finds out itself whether they lie in the ball.

Writes ``benchmarks/results/robustness/pyautoattack_agreement.json`` after each attack; rows of
other models and attacks stay. AutoAttack takes an hour of one core; its sides may run at once, as
two processes with one ``--keep``: the row is made by whoever finds both there.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.square import SquareAttack
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import UsageError
from advmoe_deploy.files import write_atomically
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import Checkpoint, load_checkpoint
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.specs import AttackSpec, ThreatModel
from advmoe_deploy.train.run.report import versions
from benchmarks.program import run_program, write
from benchmarks.training.digits import share

RESULT = Path(__file__).parents[1] / "results/robustness" / "pyautoattack_agreement.json"
SIDES = ("ours", "theirs")
ATTACKS = ("pgd", "apgd", "apgd-t", "square", "autoattack")

_BATCH = 256  # as ours, since random numbers are drawn by batch
_ROUNDING = 1e-6

Attack = Callable[[Tensor, Tensor], Tensor]


class Subject(NamedTuple):
    """A model in eval mode, float test images [N, C, H, W], labels [N], and how far one may go."""

    name: str
    model: Classifier
    images: Tensor
    labels: Tensor
    epsilon: float

    def plain(self, x: Tensor) -> Tensor:
        """Return the logits [n, K] of ``x``, and nothing else that the model has to offer."""
        logits: Tensor = self.model(x)
        return logits


def plain_pgd(subject: Subject, x: Tensor, y: Tensor, steps: int, seed: int) -> Tensor:
    """Return the first image on each path of PGD that fools, and the last of paths without one.

    Madry et al., ICLR 2018: signs of the gradient of cross-entropy, from a random start, in steps
    of 2.5 * epsilon / steps.
    """
    low, high = (x - subject.epsilon).clamp(min=0), (x + subject.epsilon).clamp(max=1)
    random = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
    now = (x + subject.epsilon * (2 * random - 1)).clamp(low, high)
    found, done = now.clone(), torch.zeros(len(x), dtype=torch.bool)
    for step in range(steps + 1):
        now.requires_grad_(True)
        logits = subject.plain(now)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), now)
        now = now.detach()
        found[~done] = now[~done]
        done |= logits.argmax(dim=1) != y
        if step < steps:
            now = (now + 2.5 * subject.epsilon / steps * gradient.sign()).clamp(low, high)
    return found


def theirs(name: str, subject: Subject, steps: int, seed: int) -> Attack:
    """Return the attack ``name`` of somebody else, on images [n, C, H, W] and labels [n]."""
    if name == "pgd":
        return lambda x, y: plain_pgd(subject, x, y, steps, seed)
    how = {"norm": "Linf", "eps": subject.epsilon, "seed": seed, "device": "cpu"}
    if name == "apgd":
        attack = APGDAttack(subject.plain, n_iter=steps, n_restarts=1, loss="ce", **how)
        return attack.perturb
    if name == "apgd-t":
        return APGDAttack_targeted(subject.plain, n_iter=steps, n_restarts=1, **how).perturb
    if name == "square":
        square = SquareAttack(subject.plain, n_queries=steps, resc_schedule=False, **how)
        return square.perturb
    suite = AutoAttack(subject.plain, **how)
    return lambda x, y: suite.run_standard_evaluation(x, y)[0]


def in_batches(attack: Attack, subject: Subject, size: int) -> Tensor:
    """Return what ``attack`` makes of all images, ``size`` at a time."""
    parts = zip(subject.images.split(size), subject.labels.split(size), strict=True)
    return torch.cat([attack(x, y).detach() for x, y in parts])


@torch.no_grad()
def stands(subject: Subject, found: Tensor) -> Tensor:
    """Return which images [N] are answered by their label, clean and as ``found``.

    Raises:
        ValueError: an image lies outside the ball, or outside [0, 1].
    """
    farthest = float((found - subject.images).abs().max())
    if farthest > subject.epsilon + _ROUNDING or found.min() < 0 or found.max() > 1:
        raise ValueError(f"an attack went {farthest:.6g} far, beyond {subject.epsilon:.6g}")
    both = torch.ones(len(found), dtype=torch.bool)
    for images in (subject.images, found):
        answers = torch.cat([subject.plain(x).argmax(dim=1) for x in images.split(_BATCH)])
        both &= answers == subject.labels
    return both


class Side(NamedTuple):
    """Which images [N] one side left, and the seconds that it took."""

    stands_N: Tensor
    seconds: float


def side_of(side: str, name: str, subject: Subject, steps: int, seed: int) -> Side:
    """Return what ``ours`` or ``theirs`` leaves by one attack."""
    began = time.perf_counter()
    if side == "ours":
        spec = AttackSpec(name=name, steps=steps, seed=seed)
        threat = ThreatModel(epsilon=subject.epsilon)
        found = find_adversarial(subject.model, subject.images, subject.labels, threat, spec)
    else:  # AutoAttack makes batches itself
        size = len(subject.images) if name == "autoattack" else _BATCH
        found = in_batches(theirs(name, subject, steps, seed), subject, size)
    return Side(stands(subject, found), time.perf_counter() - began)


def row_of(name: str, sides: Mapping[str, Side], steps: int, seed: int) -> dict[str, Any]:
    """Return what both ``sides`` leave by one attack, and of which images they differ."""
    our_N, their_N = (sides[side].stands_N for side in SIDES)
    return {
        "attack": name,
        "steps": None if name == "autoattack" else steps,
        "seed": seed,
        **{side: share(sides[side].stands_N.numpy()) for side in SIDES},
        "difference_points": round(100 * float(our_N.float().mean() - their_N.float().mean()), 4),
        "only_ours_breaks": int((their_N & ~our_N).sum()),
        "only_theirs_breaks": int((our_N & ~their_N).sum()),
        "seconds": {side: round(sides[side].seconds, 1) for side in SIDES},
    }


def subject_of(run: Path, source: str | None, images: int | None) -> tuple[Subject, dict[str, Any]]:
    """Return the model of a run or a checkpoint with its test images, and what tells of both.

    Raises:
        UsageError: the data have other classes than the model, or the model no threat model.
    """
    folder = run / "model" if (run / "model").is_dir() else run
    checkpoint, model = load_checkpoint(folder)
    data = load_dataset(source or str(checkpoint.provenance["data"]), checkpoint.decoding)
    if data.class_names != checkpoint.class_names or checkpoint.threat is None:
        raise UsageError(f"{data.source} has other classes than {run}, or the run no threat model")
    x, y = torch.from_numpy(to_float(data.test.images[:images])), data.test.labels[:images]
    name, epsilon = _name(checkpoint, run), checkpoint.threat.epsilon
    subject = Subject(name, model.eval().requires_grad_(False), x, torch.from_numpy(y), epsilon)
    return subject, {
        "model": name,
        "family": checkpoint.model.family,
        "weights_sha256": checkpoint.weights_sha256,
        "data": data.source.partition(":")[0],
        "epsilon": epsilon,
        "n": len(x),
    }


def _name(checkpoint: Checkpoint, run: Path) -> str:
    recipe = checkpoint.recipe
    return f"{recipe['name']}, seed {recipe['seed']}" if "name" in recipe else run.name


def rows_of(
    subject: Subject, about: dict[str, Any], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield a row for each attack that was asked for and of which both sides are known."""
    steps = {"pgd": 50, "square": arguments.queries}
    where = {
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "versions": {**versions(), "pyautoattack": version("pyautoattack")},
    }
    clean = share(stands(subject, subject.images).numpy())
    for name in arguments.attacks.split(","):
        asked = (name, steps.get(name, arguments.iterations), arguments.seed)
        key = "-".join(map(str, (about["weights_sha256"][:16], about["n"], *asked)))
        sides = {}
        # What may have come meanwhile is looked for last: so whoever ends last finds both.
        for side in sorted(SIDES, key=lambda side: side != arguments.side):
            file = arguments.keep and arguments.keep / f"{key}-{side}.pt"
            if file and file.exists():
                sides[side] = Side(*torch.load(file, weights_only=True))
            elif arguments.side in (None, side):
                sides[side] = side_of(side, name, subject, *asked[1:])
                if file:
                    torch.save(tuple(sides[side]), content := BytesIO())
                    write_atomically(file, content.getvalue())
        if len(sides) == len(SIDES):
            yield {**about, "clean": clean, **row_of(name, sides, *asked[1:]), **where}


def merge(path: Path, row: dict[str, Any]) -> None:
    """Write ``row`` into the JSON at ``path``, in the place of that model's and attack's last."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    key = (row["model"], row["attack"])
    kept = [each for each in rows if (each["model"], each["attack"]) != key]
    rows = sorted([*kept, row], key=lambda r: (r["model"], ATTACKS.index(r["attack"])))
    write(path, {"rows": rows})


def main() -> None:
    """Attack by both, print a line per attack, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a run, or a checkpoint's folder")
    parser.add_argument("--data", help="by default what the run was trained on")
    parser.add_argument("--images", type=int, help="of the test split; by default all")
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--iterations", type=int, default=100, help="of APGD and APGD-T")
    parser.add_argument("--queries", type=int, default=5000, help="of Square")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", choices=SIDES, help="alone; the row is made when both are kept")
    parser.add_argument("--keep", type=Path, help="a folder for what each side left")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    unknown = {*arguments.attacks.split(",")} - {*ATTACKS}
    if unknown:
        parser.error(f"unknown attacks {', '.join(sorted(unknown))}; choose from {ATTACKS}")
    if arguments.side and not arguments.keep:
        parser.error("--side needs --keep FOLDER")
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    subject, about = subject_of(arguments.run, arguments.data, arguments.images)
    for row in rows_of(subject, about, arguments):
        merge(arguments.out, row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    run_program(main)

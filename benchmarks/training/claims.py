"""What the papers claim, asked of digits: each claim with three seeds, an interval and an answer.

    python -m benchmarks.training.claims --runs FOLDER [--only switch,...] [--seeds 0,1,2]

Trains what FOLDER lacks (one to five minutes a run on one core), and measures it on the 400 test
images, robust accuracy by ``verify``'s suite ``quick``. A claim is about the sign of a difference,
the first of two figures less the last. ``over_seeds`` is Student's 95 % interval of its mean over
seeds, since another training comes out otherwise; ``over_images`` that over images, each taken over
all seeds, since other images do. A claim is confirmed if both lie on its side of zero, refuted if
both lie on the other, else undecided.

Writes ``benchmarks/results/claims.json`` after each claim; those that were not asked stay.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

import advmoe_deploy as advmoe
from advmoe_deploy.analysis.redundancy import FixedExpert
from advmoe_deploy.analysis.routes import route_use
from advmoe_deploy.analysis.routing_change import changed_images
from advmoe_deploy.analysis.shares import answers
from advmoe_deploy.attacks.route_aware import withstanding
from advmoe_deploy.attacks.white_box import attack_model, predict
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.stored import open_stored
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.specs import AttackSpec, AttackTarget, ThreatModel
from advmoe_deploy.train.run.report import versions
from advmoe_deploy.verify.suites import attack_suite
from benchmarks.program import run_program, write

RESULT = Path(__file__).parents[1] / "results" / "claims.json"

# Figures by name: flags or numbers by image [N], or one number of all images [1].
Figures = dict[str, Tensor]


class Subject(NamedTuple):
    """A trained model, the test images [N, C, H, W], their labels [N] and the threat model."""

    model: Classifier
    images: Tensor
    labels: Tensor
    threat: ThreatModel

    def withstands(self, network: Classifier | None = None) -> Tensor:
        """Return which images [N] withstand the suite ``quick``, of the model or a part of it."""
        model = network or self.model
        suite = attack_suite("quick", self.model.spec)
        if not model.rules:
            suite = tuple(attack for attack in suite if attack.target == "model")
        return withstanding(model, self.images, self.labels, self.threat, suite)[-1]

    def moved(self, attack: AttackSpec, epsilon: float | None = None) -> Tensor:
        """Return which images [N] ``attack`` sends to other experts."""
        model, x, y, threat = self
        ball = threat if epsilon is None else ThreatModel(epsilon=epsilon)
        found = attack_model(model, x, y, ball, attack)
        return changed_images(answers(model, x)[1], answers(model, found)[1], len(y))


class Seed(NamedTuple):
    """Runs of one seed, trained where they are not there yet."""

    number: int
    folder: Path

    def run(self, recipe: str, *settings: str, name: str = "", start: Path | None = None) -> Path:
        """Return the run of ``recipe``, begun from that of ``start``; it is called ``name``."""
        run = self.folder / f"{name or recipe}-{self.number}"
        # What a run reaches under attack is measured here, so its own test is kept short.
        settings = (f"seed={self.number}", "test_attack_steps=1", *settings)
        # A finished run of these settings is taken as it is, one of others refused.
        advmoe.train(recipe, run, settings=settings, start=start, resume=run.exists())
        return run

    def subject(self, run: Path) -> Subject:
        """Return the model of ``run`` with the test images."""
        stored = open_stored(run)
        test = load_dataset("digits").test
        x, y = torch.from_numpy(to_float(test.images)), torch.from_numpy(test.labels)
        return Subject(stored.model.eval().requires_grad_(False), x, y, stored.threat_model(None))

    def standard(self) -> Path:
        """Return AdvMoE's network, trained on clean images."""
        return self.run("digits-moe-standard")

    def robust_router(self) -> Path:
        """Return the same, its router trained adversarially over these experts."""
        return self.run("digits-router-only", start=self.standard())

    def robust_experts(self) -> Path:
        """Return the same as the standard one, its experts trained adversarially."""
        return self.run("digits-experts-only", start=self.standard())

    def experts_moved(self) -> Path:
        """Return the experts behind the robust router, trained on adversarially."""
        name = "digits-experts-moved"
        return self.run("digits-experts-only", name=name, start=self.robust_router())

    def block_moe(self, balance: str) -> Subject:
        """Return Robust Experts' model of whole blocks, trained with the loss ``balance``."""
        name = f"digits-block-moe-{balance}"
        run = self.run("digits-block-moe", f"balance_loss={balance}", name=name)
        return self.subject(run)


def robust_router_gains(seed: Seed) -> Figures:
    """Robust accuracy of a robust router over standard experts, and of the standard model."""
    one, other = (seed.subject(run) for run in (seed.robust_router(), seed.standard()))
    return {"robust router": one.withstands(), "standard": other.withstands()}


def robust_experts_gain_more(seed: Seed) -> Figures:
    """Robust accuracy of robust experts under a standard router, and the other way round."""
    one, other = (seed.subject(run) for run in (seed.robust_experts(), seed.robust_router()))
    return {"robust experts": one.withstands(), "robust router": other.withstands()}


def routers_do_not_keep(seed: Seed) -> Figures:
    """Images that PGD, straight through the router, sends elsewhere, after experts moved first."""
    attack = AttackSpec(name="pgd", target="straight-through", steps=20)
    after, before = (
        seed.subject(run).moved(attack) for run in (seed.experts_moved(), seed.robust_router())
    )
    return {"after": after, "before": before}


def switch_collapses(seed: Seed) -> Figures:
    """Effective experts, fewest over layers, with the switch loss; and half of the experts."""
    counts = {}
    for loss in ("switch", "entropy"):
        subject = seed.block_moe(loss)
        use = route_use(subject.model, subject.images, subject.labels)
        counts[loss] = torch.tensor([min(layer.effective_routes for layer in use)])
    half = subject.model.spec.num_experts / 2
    return {**counts, "half of the experts": torch.tensor([half])}


def fixed_beats_gated(seed: Seed) -> Figures:
    """Robust accuracy of the best fixed expert, and of the model that chooses among them.

    The expert is chosen on every other image and measured on those between, for the best of
    several on the images that chose it flatters.
    """
    subject = seed.block_moe("switch")
    experts = subject.model.experts_in_use
    fixed = [subject.withstands(FixedExpert(subject.model, expert)) for expert in experts]
    best_N = max(fixed, key=lambda right_N: int(right_N[::2].sum()))
    return {"best fixed": best_N[1::2], "routed": subject.withstands()[1::2]}


def experts_or_router(seed: Seed) -> Figures:
    """RA-E and RA-R of RT-ER: experts attacked along the clean routes, and the router alone."""
    subject = seed.subject(seed.run("digits-rt-er"))
    return {"RA-E": _right_under(subject, "experts"), "RA-R": _right_under(subject, "router")}


def _right_under(subject: Subject, target: AttackTarget) -> Tensor:
    model, x, y, threat = subject
    found = attack_model(
        model, x, y, threat, AttackSpec(name="pgd", target=target), first_only=True
    )
    return predict(model, found, routes_of=x if target == "experts" else None) == y


def routes_move_with_epsilon(seed: Seed) -> Figures:
    """Images of which V-MoE's attack moves a route, at all of the radius down to 1/20 of it."""
    subject = seed.subject(seed.run("digits-vit-moe"))
    figures = {}
    for part in (20, 10, 5, 1):
        epsilon = part / 20 * subject.threat.epsilon
        attack = AttackSpec(name="pgd", steps=40, step_size=epsilon / 40, random_start=False)
        figures[f"{part}/20 epsilon"] = subject.moved(attack, epsilon)
    return figures


def vit_moe_beats_dense(seed: Seed) -> Figures:
    """Robust accuracy of the ViT-MoE, and of the ViT of the same compute."""
    return {
        name: seed.subject(seed.run(name)).withstands() for name in ("digits-vit-moe", "digits-vit")
    }


class Claim(NamedTuple):
    """What a paper says, the sign of the difference if it is so, and how that is measured."""

    paper: str
    says: str
    sign: int
    measure: Callable[[Seed], Figures]


CLAIMS = {
    "robust-router": Claim(
        "arXiv 2308.10110", "a robust router makes standard experts more robust", +1,
        robust_router_gains,
    ),
    "robust-experts": Claim(
        "arXiv 2308.10110", "alone, robust experts are worth more than a robust router", +1,
        robust_experts_gain_more,
    ),
    "router-kept": Claim(
        "arXiv 2308.10110", "a router's robustness is lost as experts are trained on", +1,
        routers_do_not_keep,
    ),
    "switch": Claim(
        "arXiv 2509.05086", "the switch loss collapses routes onto less than half of the experts",
        -1, switch_collapses,
    ),
    "fixed-expert": Claim(
        "arXiv 2509.05086", "a fixed expert withstands more than the model that chooses", +1,
        fixed_beats_gated,
    ),
    "rt-er": Claim(
        "arXiv 2502.06832", "after RT-ER experts withstand more than the router", +1,
        experts_or_router,
    ),
    "routes-move": Claim(
        "arXiv 2210.10253", "the more an attack may change, the more routes move", +1,
        routes_move_with_epsilon,
    ),
    "vit-moe": Claim(
        "arXiv 2210.10253", "a ViT-MoE withstands more than a dense ViT of equal compute", +1,
        vit_moe_beats_dense,
    ),
}  # fmt: skip


def interval(values: Tensor) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean of ``values`` [n], n at least 2."""
    mean, n = float(values.mean()), len(values)
    half = float(student.ppf(0.975, n - 1)) * float(values.std()) / n**0.5
    return mean - half, mean + half


def answer(measured: Sequence[Figures], sign: int) -> dict[str, Any]:
    """Return the difference of the first and the last figure, its intervals, and the answer."""
    pairs = [list(figures.values()) for figures in measured]
    differences_SN = torch.stack([first.double() - last.double() for first, *_, last in pairs])
    result: dict[str, Any] = {"difference": float(differences_SN.mean())}
    result["over_seeds"] = interval(differences_SN.mean(dim=1))
    if differences_SN.shape[1] > 1:
        result["over_images"] = interval(differences_SN.mean(dim=0))
    ends = [each for key in ("over_seeds", "over_images") for each in result.get(key, ())]
    sides = {+1: min(ends) > 0, -1: max(ends) < 0}
    verdict = "confirmed" if sides[sign] else "refuted" if sides[-sign] else "undecided"
    return {**result, "answer": verdict}


def row_of(claim: Claim, seeds: Sequence[Seed]) -> dict[str, Any]:
    """Return what the seeds say of a claim."""
    began = time.perf_counter()
    measured = [claim.measure(seed) for seed in seeds]
    means = [{k: float(v.double().mean()) for k, v in figures.items()} for figures in measured]
    return {
        "paper": claim.paper,
        "says": claim.says,
        **answer(measured, claim.sign),
        "images": max(len(values) for values in measured[0].values()),
        "seeds": [{"seed": seed.number, **m} for seed, m in zip(seeds, means, strict=True)],
        "seconds": round(time.perf_counter() - began, 1),
        "processor": processor_name(),
        "versions": versions(),
    }


def merge(path: Path, name: str, row: dict[str, Any]) -> None:
    """Write ``row`` into the JSON at ``path`` in the place of that claim's last."""
    rows = json.loads(path.read_text())["claims"] if path.exists() else {}
    write(path, {"claims": dict(sorted({**rows, name: row}.items()))})


def main() -> None:
    """Train, measure, print a line per claim, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="where runs are, or will be")
    parser.add_argument("--only", default=",".join(CLAIMS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if unknown := {*arguments.only.split(",")} - {*CLAIMS}:
        parser.error(
            f"unknown claims {', '.join(sorted(unknown))}; choose from {', '.join(CLAIMS)}"
        )
    seeds = [Seed(int(number), arguments.runs) for number in arguments.seeds.split(",")]
    if len({seed.number for seed in seeds}) < max(2, len(seeds)):
        parser.error("an interval over seeds needs two of them, each once; --seeds 0,1,2")
    torch.set_num_threads(arguments.threads)
    for name in arguments.only.split(","):
        row = row_of(CLAIMS[name], seeds)
        merge(arguments.out, name, row)
        print(json.dumps({"claim": name, **row}), flush=True)


if __name__ == "__main__":
    run_program(main)

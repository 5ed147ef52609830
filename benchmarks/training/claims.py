"""What the papers claim, asked of digits: each claim with three seeds, an interval and an answer.

    python -m benchmarks.training.claims --runs FOLDER [--only switch,...] [--seeds 0,1,2]

Trains what FOLDER lacks (about two minutes a run on one core), and measures it on the 400 test
images. A claim is about the sign of a difference. The difference is taken on each seed; ``low`` and
``high`` are Student's 95 % interval of its mean over seeds, which knows that a second training
comes out otherwise. The claim is confirmed if the whole interval has its sign, refuted if it has
the other one, else undecided.

Writes ``benchmarks/results/claims.json`` after each claim; those that were not asked stay.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

import advmoe_deploy as advmoe
from advmoe_deploy.analysis.redundancy import FixedExpert
from advmoe_deploy.analysis.routes import route_use
from advmoe_deploy.analysis.routing_change import effect_of
from advmoe_deploy.analysis.several.dissect import DissectionReport, dissect
from advmoe_deploy.analysis.several.roles import Role, read_run, roles_of
from advmoe_deploy.analysis.several.trial import TrialSettings
from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.white_box import attack_model, predict
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.stored import open_stored
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.specs import AttackSpec, AttackTarget, ThreatModel
from advmoe_deploy.train.run.report import versions

RESULT = Path(__file__).parents[1] / "results" / "claims.json"


class Subject(NamedTuple):
    """A trained model, the test images [N, C, H, W], their labels [N] and the threat model."""

    model: Classifier
    images: Tensor
    labels: Tensor
    threat: ThreatModel

    def right(self, attack: AttackSpec, network: Classifier | None = None) -> Tensor:
        """Return which images [N] ``network``, by default the model, gets right under attack."""
        network = network or self.model
        found = find_adversarial(
            network, self.images, self.labels, self.threat, attack, first_only=True
        )
        return predict(network, found) == self.labels


class Seed(NamedTuple):
    """Runs of one seed, trained where they are not there yet."""

    number: int
    folder: Path

    def run(self, recipe: str, *settings: str, name: str = "", start: Path | None = None) -> Path:
        """Return the run of ``recipe``, begun from that of ``start``; it is called ``name``."""
        run = self.folder / f"{name or recipe}-{self.number}"
        settings = (f"seed={self.number}", *settings)
        # A finished run of these settings is taken as it is, one of others refused.
        advmoe.train(recipe, run, settings=settings, start=start, resume=run.exists())
        return run

    def subject(self, recipe: str, *settings: str, name: str = "") -> Subject:
        """Return the model of the run of ``recipe``, with the test images."""
        stored = open_stored(self.run(recipe, *settings, name=name))
        test = load_dataset("digits").test
        x, y = torch.from_numpy(to_float(test.images)), torch.from_numpy(test.labels)
        return Subject(stored.model.eval().requires_grad_(False), x, y, stored.threat_model(None))

    def block_moe(self, balance: str) -> Subject:
        """Return Robust Experts' model of whole blocks, trained with the loss ``balance``."""
        name = f"digits-block-moe-{balance}"
        return self.subject("digits-block-moe", f"balance_loss={balance}", name=name)


@cache
def dissected(seed: Seed) -> DissectionReport:
    """Return what each part of AdvMoE is worth, of runs that begin with one another."""
    standard = seed.run("digits-moe-standard")
    router = seed.run("digits-router-only", start=standard)
    experts = seed.run("digits-experts-only", start=standard)
    moved = seed.run("digits-experts-only", name="digits-experts-moved", start=router)
    runs = roles_of([read_run(run.name, run) for run in (standard, router, experts, moved)])
    return dissect(runs, TrialSettings(images=None))


def robust_router_gains(seed: Seed) -> dict[str, float]:
    """Robust accuracy of a robust router over standard experts, less that of the standard model."""
    return _compared(seed, "robust router", "standard")


def robust_experts_gain_more(seed: Seed) -> dict[str, float]:
    """Robust accuracy of robust experts under a standard router, less that of a robust router."""
    return _compared(seed, "robust experts", "robust router")


def _compared(seed: Seed, one: Role, other: Role) -> dict[str, float]:
    """Return the accuracy under all of PGD's targets of two runs, and how they differ."""
    first, second = (dissected(seed).of(role).withstood.together.value for role in (one, other))
    return {one: first, other: second, "difference": first - second}


def routers_do_not_keep(seed: Seed) -> dict[str, float]:
    """Images that PGD on the model sends elsewhere, after experts were trained on less before."""
    before, after = (
        dissected(seed).of(role).flips.value for role in ("robust router", "experts moved")
    )
    return {"before": before, "after": after, "difference": after - before}


def switch_collapses(seed: Seed) -> dict[str, float]:
    """Effective experts, fewest over layers, with the switch loss and with the entropy loss."""
    counts = {}
    for loss in ("switch", "entropy"):
        subject = seed.block_moe(loss)
        use = route_use(subject.model, subject.images, subject.labels)
        counts[loss] = min(layer.effective_routes for layer in use)
    return {**counts, "difference": counts["switch"] - counts["entropy"]}


def fixed_beats_gated(seed: Seed) -> dict[str, float]:
    """Robust accuracy of the best fixed expert less the gated model's, worst of PGD and APGD.

    The expert is chosen on every other image and measured on those between, for the best of
    several on the images that chose it flatters.
    """
    subject = seed.block_moe("switch")
    attacks = [AttackSpec(name="pgd", steps=20), AttackSpec(name="apgd", steps=20)]
    networks: list[Classifier] = [subject.model]
    networks += [FixedExpert(subject.model, e) for e in subject.model.experts_in_use]
    gated_N, *fixed = (
        torch.stack([subject.right(attack, network) for attack in attacks]).all(dim=0)
        for network in networks
    )
    best_N = max(fixed, key=lambda right_N: int(right_N[::2].sum()))
    best, gated = _share(best_N[1::2]), _share(gated_N[1::2])
    return {"best fixed": best, "gated": gated, "difference": best - gated}


def experts_or_router(seed: Seed) -> dict[str, float]:
    """RA-E less RA-R of RT-ER: experts attacked along the clean routes, and the router alone."""
    subject = seed.subject("digits-rt-er")
    experts, router = (_withstands(subject, target) for target in ("experts", "router"))
    return {"RA-E": experts, "RA-R": router, "difference": experts - router}


def _withstands(subject: Subject, target: AttackTarget) -> float:
    model, x, y, threat = subject
    attack = AttackSpec(name="pgd", target=target)
    found = attack_model(model, x, y, threat, attack, first_only=True)
    return _share(predict(model, found, routes_of=x if target == "experts" else None) == y)


def _share(right_N: Tensor) -> float:
    return float(right_N.double().mean())


def routes_move_with_epsilon(seed: Seed) -> dict[str, float]:
    """Change of V-MoE's routes, mean over layers, at 1/20 of the radius up to all of it."""
    subject = seed.subject("digits-vit-moe")
    changes = {}
    for part in (1, 5, 10, 20):
        ball = ThreatModel(epsilon=part / 20 * subject.threat.epsilon)
        effect = effect_of(subject.model, *subject[1:3], ball, _forty_steps(ball.epsilon))
        change = statistics.fmean(layer.set_change for layer in effect.layers)
        changes[f"{part}/20 epsilon"] = change
    first, *_, last = changes.values()
    return {**changes, "difference": last - first}


def vit_moe_beats_dense(seed: Seed) -> dict[str, float]:
    """Robust accuracy of the ViT-MoE less that of its dense twin, under V-MoE's 40 steps."""
    shares = {}
    for name in ("digits-vit-moe", "digits-vit"):
        subject = seed.subject(name)
        shares[name] = _share(subject.right(_forty_steps(subject.threat.epsilon)))
    return {**shares, "difference": shares["digits-vit-moe"] - shares["digits-vit"]}


def _forty_steps(epsilon: float) -> AttackSpec:
    return AttackSpec(name="pgd", steps=40, step_size=epsilon / 40, random_start=False)


class Claim(NamedTuple):
    """What a paper says, the sign of the difference if it is so, and how that is measured."""

    paper: str
    says: str
    sign: int
    measure: Callable[[Seed], dict[str, float]]


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
        "arXiv 2509.05086", "the switch loss collapses routes onto few experts", -1,
        switch_collapses,
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


def answer(differences: Sequence[float], sign: int) -> dict[str, Any]:
    """Return the mean difference, its interval over seeds, and what that says of the claim."""
    mean, n = statistics.fmean(differences), len(differences)
    half = student.ppf(0.975, n - 1) * statistics.stdev(differences) / n**0.5
    low, high = mean - half, mean + half
    signs = {+1: low > 0, -1: high < 0}
    verdict = "confirmed" if signs[sign] else "refuted" if signs[-sign] else "undecided"
    return {"difference": mean, "low": low, "high": high, "answer": verdict}


def merge(path: Path, name: str, row: dict[str, Any]) -> None:
    """Write ``row`` into the JSON at ``path`` in the place of that claim's last."""
    rows = json.loads(path.read_text())["claims"] if path.exists() else {}
    ordered = sorted({**rows, name: row}.items())
    path.write_text(json.dumps({"claims": dict(ordered)}, indent=2) + "\n")


def main() -> None:
    """Train, measure, print a line per claim, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="where runs are, or will be")
    parser.add_argument("--only", default=",".join(CLAIMS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.only.split(","):
        claim, began = CLAIMS[name], time.perf_counter()
        seeds = [Seed(int(number), arguments.runs) for number in arguments.seeds.split(",")]
        measured = [claim.measure(seed) for seed in seeds]
        row = {
            "paper": claim.paper,
            "says": claim.says,
            **answer([each["difference"] for each in measured], claim.sign),
            "seeds": [{"seed": s.number, **m} for s, m in zip(seeds, measured, strict=True)],
            "seconds": round(time.perf_counter() - began, 1),
            "processor": processor_name(),
            "versions": versions(),
        }
        merge(arguments.out, name, row)
        print(json.dumps({"claim": name, **row}), flush=True)


if __name__ == "__main__":
    main()

"""Budget of an analysis: which sections, on how many images, fit into a time."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from advmoe_deploy.analysis.protocol.capacity import ratios_of
from advmoe_deploy.analysis.protocol.radii import Protocol, targets_of
from advmoe_deploy.analysis.redundancy import TARGETS
from advmoe_deploy.analysis.smoothing import Smoothing
from advmoe_deploy.attacks.effort import passes_of
from advmoe_deploy.attacks.white_box import attack_model
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.specs import AttackSpec, AttackTarget, ThreatModel

FEWEST = 8  # images; of fewer, no share says anything
_TIMED = 16  # images whose attack is timed
_SHARE = 0.8  # of the time is planned with, for a pass takes longer at times
_LIPSCHITZ_PASSES = 6  # an image and two neighbours of it, of each part, there and back
_JUMP_PASSES = 20


@dataclass(frozen=True)
class BudgetPlan:
    """Plan within a budget: the images, the sections that fit, and those that do not."""

    images: int
    sections: tuple[str, ...]
    left_out: tuple[str, ...]

    def notes(self, asked: int, seconds: float) -> tuple[str, ...]:
        """Return what a reader has to know of a plan that is less than was ``asked`` for."""
        notes = []
        if self.images < asked:
            notes.append(f"the budget of {seconds:g} s is for {self.images} of {asked} images")
        if self.left_out:
            notes.append(
                f"left out, for the budget of {seconds:g} s is too small even for {FEWEST} images: "
                f"{', '.join(self.left_out)}"
            )
        return tuple(notes)


def passes_by_section(
    model: Classifier,
    sections: Sequence[str],
    watched: Sequence[AttackTarget],
    steps: int,
    smoothing: Smoothing,
    protocol: Protocol,
) -> dict[str, int]:
    """Return how many passes each section makes with an image, about and at most."""

    def attack(target: AttackTarget, steps: int = steps) -> int:
        return passes_of(model, AttackSpec(name="pgd", steps=steps, target=target), 1)

    def by_protocol(target: AttackTarget) -> int:
        return attack(target, protocol.steps)

    experts = len(model.experts_in_use)
    apgd = passes_of(model, AttackSpec(name="apgd", steps=steps), 1)
    # Each expert by PGD and APGD; the routed model by APGD, for PGD on it is one of the targets.
    twin = by_protocol("model") + 3 if protocol.twin else 0
    # Before and after: what attacks make is judged, and answered by each expert, and without one.
    looks = experts + len(model.rules) + 6
    alone = experts * (attack("model") + apgd + 3) + apgd + 2
    passes: dict[str, Callable[[], int]] = {
        "routes": lambda: 1,
        "changes": lambda: sum(attack(target) + 2 for target in watched),
        "experts": lambda: sum(map(attack, TARGETS)) + alone,
        "lipschitz": lambda: (_LIPSCHITZ_PASSES + _JUMP_PASSES) * max(1, experts),
        "certificate": lambda: 2 * max(1, experts),
        "radii": lambda: (
            looks
            + len(protocol.radii) * (sum(by_protocol(e) + looks for e in targets_of(model)) + twin)
        ),
        "capacity": lambda: len(ratios_of(model, protocol)) * (by_protocol("model") + 5) + twin,
        "smoothing": lambda: smoothing.n0 + smoothing.n,
    }
    return {section: passes[section]() for section in sections}


def plan_within(
    seconds: float, per_pass: float, passes: Mapping[str, int], images: int
) -> BudgetPlan:
    """Return the most that fits into ``seconds`` where a pass with an image takes ``per_pass``.

    All sections see as many images. Where not even :data:`FEWEST` fit, sections are left out, the
    costliest first; the last one stays, whatever it takes.
    """
    kept = dict(passes)
    fewest = min(FEWEST, images)
    while len(kept) > 1 and _fitting(seconds, per_pass, kept) < fewest:
        del kept[max(kept, key=lambda section: kept[section])]
    fit = max(fewest, min(images, _fitting(seconds, per_pass, kept)))
    return BudgetPlan(fit, tuple(kept), tuple(section for section in passes if section not in kept))


def seconds_per_pass(
    model: Classifier, images: Tensor, labels: Tensor, threat: ThreatModel
) -> float:
    """Return how long one pass of an attack takes with one image on this machine."""
    attack = AttackSpec(name="pgd", steps=1)
    few = min(len(labels), _TIMED)
    taken = []
    for _ in range(2):  # the first run prepares what the others need
        started = time.perf_counter()
        attack_model(model, images[:few], labels[:few], threat, attack)
        taken.append(time.perf_counter() - started)
    return min(taken) / passes_of(model, attack, few)


def _fitting(seconds: float, per_pass: float, passes: Mapping[str, int]) -> int:
    return int(_SHARE * seconds / max(per_pass * sum(passes.values()), 1e-12))

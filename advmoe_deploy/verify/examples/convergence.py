"""Convergence of an attack: whether more steps and more restarts would have broken more images.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from advmoe_deploy.attacks.effort import attack_task
from advmoe_deploy.attacks.route_aware import route_aware
from advmoe_deploy.attacks.white_box import attack_model, predict
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.parity.answers import Images, Labels
from advmoe_deploy.parity.intervals import wilson_interval
from advmoe_deploy.progress import Progress, task
from advmoe_deploy.specs import AttackSpec, AttackTarget, Frozen, ThreatModel

MOST_IMAGES = 128
STEPS = (5, 10, 20, 50)
RESTARTS = (1, 3)


class ConvergenceRow(Frozen):
    """Share of ``images`` images that stand after one attack alone, with its Wilson interval.

    ``fell`` of them stood after the next fewer steps, ``stood`` the other way round.
    """

    target: AttackTarget
    steps: int
    restarts: int
    images: int
    robust_accuracy: float
    low: float
    high: float
    fell: int = 0
    stood: int = 0


def convergence(
    model: Classifier,
    x_NCHW: Images,
    labels_N: Labels,
    threat: ThreatModel,
    progress: Progress,
) -> tuple[ConvergenceRow, ...]:
    """Return how the first 128 images withstand PGD of 5 to 50 steps and of 1 and 3 restarts.

    A model that routes is attacked as it runs and by its pathways. Every row starts anew: no image
    is carried over from a weaker attack.
    """
    x, labels = torch.from_numpy(x_NCHW[:MOST_IMAGES]), torch.from_numpy(labels_N[:MOST_IMAGES])
    right_N = predict(model, x) == labels
    attacks = [
        attack
        for steps, restarts in product(STEPS, RESTARTS)
        for attack in route_aware(model, AttackSpec(name="pgd", steps=steps, restarts=restarts))
    ]
    rows: list[ConvergenceRow] = []
    standing: dict[tuple[AttackTarget, int], Tensor] = {}
    with task(progress, "convergence", len(attacks)):
        for attack in attacks:
            with attack_task(progress, model, attack, int(right_N.sum())):
                found = attack_model(
                    model, x[right_N], labels[right_N], threat, attack, first_only=True
                )
            stands_N = right_N.clone()
            if len(found):
                stands_N[right_N] = predict(model, found) == labels[right_N]
            kind = attack.target, attack.restarts
            rows.append(_row(attack, stands_N, standing.get(kind, stands_N)))
            standing[kind] = stands_N
            progress.advance("convergence", robust_accuracy=rows[-1].robust_accuracy)
    return tuple(rows)


def lines_of(rows: Sequence[ConvergenceRow]) -> tuple[tuple[ConvergenceRow, ...], ...]:
    """Return ``rows`` by target and number of restarts, each line ascending in steps."""
    kinds = sorted({(row.target, row.restarts) for row in rows})
    return tuple(
        tuple(sorted((r for r in rows if (r.target, r.restarts) == kind), key=lambda r: r.steps))
        for kind in kinds
    )


def _row(attack: AttackSpec, stands_N: Tensor, before_N: Tensor) -> ConvergenceRow:
    stands, images = int(stands_N.sum()), len(stands_N)
    low, high = wilson_interval(stands, images)
    return ConvergenceRow(
        target=attack.target,
        steps=attack.steps,
        restarts=attack.restarts,
        images=images,
        robust_accuracy=stands / images,
        low=low,
        high=high,
        fell=int((before_N & ~stands_N).sum()),
        stood=int((stands_N & ~before_N).sum()),
    )

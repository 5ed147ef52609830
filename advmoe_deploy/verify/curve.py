"""Accuracy curve under a growing attack: a smooth fall is a sign of an honest attack."""

from collections.abc import Sequence

import torch

from advmoe_deploy.attacks.route_aware import route_aware, withstanding
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.data.dataset import Split, to_float
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.parity.intervals import wilson_interval
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.specs import AttackSpec, Frozen, ThreatModel


class CurvePoint(Frozen):
    """Accuracy at one l-inf radius, with its 95 % Wilson interval. Shares and pixels in [0, 1]."""

    epsilon: float
    accuracy: float
    low: float
    high: float


def robustness_curve(
    model: Classifier,
    split: Split,
    epsilons: Sequence[float],
    *,
    steps: int = 20,
    progress: Progress | None = None,
) -> tuple[CurvePoint, ...]:
    """Return the accuracy of ``model`` on ``split`` under PGD at each radius; 0 means clean.

    A model that routes is attacked twice, as it runs and by its pathways; an image counts only if
    it withstands both.
    """
    progress = progress or Silent()
    x_NCHW, labels_N = torch.from_numpy(to_float(split.images)), torch.from_numpy(split.labels)
    points = []
    with task(progress, "robustness curve", len(epsilons)):
        for epsilon in epsilons:
            right_N = predict(model, x_NCHW) == labels_N
            if epsilon > 0:
                attacks = route_aware(model, AttackSpec(name="pgd", steps=steps))
                threat = ThreatModel(epsilon=epsilon)
                right_N = withstanding(model, x_NCHW, labels_N, threat, attacks, progress)[-1]
            correct = int(right_N.sum())
            low, high = wilson_interval(correct, len(labels_N))
            accuracy = correct / len(labels_N)
            points.append(CurvePoint(epsilon=epsilon, accuracy=accuracy, low=low, high=high))
            progress.advance("robustness curve", accuracy=accuracy)
    return tuple(points)

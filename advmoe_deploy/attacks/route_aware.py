"""The least that an honest robust accuracy of a routed model needs: its routes attacked, too.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from advmoe_deploy.attacks.effort import attack_task
from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.specs import AttackSpec, ThreatModel


def route_aware(model: Classifier, attack: AttackSpec) -> tuple[AttackSpec, ...]:
    """Return ``attack``, and for a model that routes the same effort on its pathways."""
    if not model.rules:
        return (attack,)
    how = {"target": "pathway", "loss": "margin", "momentum": 0.75, "decay": True}
    return (attack, attack.model_copy(update={**how, "step_size": None}))


def withstanding(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    attacks: Sequence[AttackSpec],
    progress: Progress | None = None,
) -> list[Tensor]:
    """Return which float images [N, C, H, W] stand after each attack, bool [N], right and unturned.

    Each attack gets those that stood before it.
    """
    standing_N, after = predict(model, images) == labels, []
    for attack in attacks:
        rows_A = standing_N.nonzero()[:, 0]
        x, y = images[rows_A], labels[rows_A]
        with attack_task(progress or Silent(), model, attack, len(x)):
            found = find_adversarial(model, x, y, threat, attack, first_only=True)
        standing_N = torch.zeros_like(standing_N).index_fill_(
            0, rows_A[predict(model, found) == y], value=True
        )
        after.append(standing_N)
    return after

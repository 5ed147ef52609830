"""One way to every attack on a torch model."""

import torch
from torch import Tensor

from advmoe_deploy.attacks.autoattack import apgd, square, standard_autoattack
from advmoe_deploy.attacks.pgd import eval_mode
from advmoe_deploy.attacks.white_box import BATCH, attack_model
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.specs import AttackSpec, ThreatModel


def find_adversarial(
    model: Classifier, images: Tensor, labels: Tensor, threat: ThreatModel, attack: AttackSpec
) -> Tensor:
    """Return adversarial images [N, C, H, W] by ``attack``, whichever it is.

    ``images`` are float in [0, 1]; the same seed gives the same examples.

    Raises:
        UsageError: the model has no router for the target, or the attack cannot aim at it.
        CheckFailedError: the model's loss is not finite.
    """
    if not len(images):
        return images.clone()
    if attack.name == "pgd":
        return attack_model(model, images, labels, threat, attack)
    if attack.name == "apgd":
        return apgd(model, images, labels, threat, attack)
    if attack.name == "autoattack":
        return standard_autoattack(model, images, labels, threat, seed=attack.seed)
    return _square(model, images, labels, threat, attack)


@torch.no_grad()
def _square(
    model: Classifier, images: Tensor, labels: Tensor, threat: ThreatModel, attack: AttackSpec
) -> Tensor:
    with eval_mode(model):
        found = [
            square(
                model,
                x,
                y,
                epsilon=threat.epsilon,
                queries=attack.steps,
                restarts=attack.restarts,
                seed=attack.seed,
            )
            for x, y in zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True)
        ]
    return torch.cat(found)

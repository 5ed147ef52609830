"""Entry to all attacks on a torch model: adversarial images for any attack spec."""

import torch
from torch import Tensor

from advmoe_deploy.attacks.autoattack import library_attack, standard_autoattack
from advmoe_deploy.attacks.batches import in_pieces
from advmoe_deploy.attacks.black_box import NAMES, ask_only
from advmoe_deploy.attacks.objectives import Answer
from advmoe_deploy.attacks.pgd import eval_mode
from advmoe_deploy.attacks.white_box import attack_model
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.specs import AttackSpec, ThreatModel


def find_adversarial(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    attack: AttackSpec,
    *,
    answer: Answer | None = None,
    first_only: bool = False,
) -> Tensor:
    """Return adversarial images [N, C, H, W] by ``attack``, whichever it is.

    ``images`` are float in [0, 1]; the same seed gives the same examples. With ``first_only`` PGD
    leaves an image alone once it fools. With ``answer``, who
    answers is attacked by the gradients of ``model``, see :func:`attack_model`.

    Raises:
        UsageError: the model has no router for the target, or the attack cannot aim at it, or at
            another's answer.
        CheckFailedError: the model's loss is not finite.
    """
    if not len(images):
        return images.clone()
    if attack.name == "pgd":
        return attack_model(
            model, images, labels, threat, attack, answer=answer, first_only=first_only
        )
    if answer is not None:
        raise UsageError(f"{attack.name} cannot lend a model's gradients; use pgd")
    if attack.name == "autoattack":
        return standard_autoattack(model, images, labels, threat, attack)
    if attack.name not in NAMES:
        return library_attack(model, images, labels, threat, attack)
    with eval_mode(model), torch.no_grad():
        return ask_only(in_pieces(model, model), images, labels, threat, attack)

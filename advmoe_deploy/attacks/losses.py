"""Losses of attacks, per image: cross-entropy, or the lead of a wrong class.

Shapes: N images, K classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.specs import AttackLoss


def attack_loss(
    name: AttackLoss, logits_NK: Tensor, labels_N: Tensor, targets_N: Tensor | None = None
) -> Tensor:
    """Return the loss [N] of that name; with ``targets_N``, it wants that class and no other."""
    if name == "margin":
        return lead_over_label(logits_NK, labels_N, targets_N)
    if targets_N is not None:
        return -F.cross_entropy(logits_NK, targets_N, reduction="none")
    return F.cross_entropy(logits_NK, labels_N, reduction="none")


def lead_over_label(logits_NK: Tensor, labels_N: Tensor, targets_N: Tensor | None = None) -> Tensor:
    """Return by how much the target, or the best wrong class, leads the label [N]."""
    label_N = logits_NK.gather(1, labels_N[:, None])[:, 0]
    if targets_N is not None:
        return logits_NK.gather(1, targets_N[:, None])[:, 0] - label_N
    others_NK = logits_NK.scatter(1, labels_N[:, None], -torch.inf)
    return others_NK.amax(dim=1) - label_N


def likeliest_targets(logits_NK: Tensor, labels_N: Tensor, count: int) -> list[Tensor]:
    """Return the ``count`` likeliest wrong classes [N] of each image, or as many as there are."""
    others_NK = logits_NK.scatter(1, labels_N[:, None], -torch.inf)
    count = min(count, logits_NK.shape[1] - 1)
    return list(others_NK.topk(count, dim=1).indices.unbind(1))


def is_wrong(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Return which rows [N] do not answer their label; logits that are not finite answer none."""
    return (logits_NK.argmax(dim=1) != labels_N) | ~torch.isfinite(logits_NK).all(dim=1)


def require_finite_loss(loss_N: Tensor) -> Tensor:
    """Return ``loss_N``; NaN or infinity raises :class:`CheckFailedError`."""
    # The sign of NaN is 0: an attack on such a model would be mere noise and call it robust.
    if not bool(torch.isfinite(loss_N).all()):
        raise CheckFailedError(
            "the model's loss is not finite under attack, so no attack can tell anything; "
            "use an earlier checkpoint or train again"
        )
    return loss_N

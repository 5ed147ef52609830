"""Losses in log space, so that no probability underflows.

Shapes: N images, K classes, E experts.
"""

from torch import Tensor
from torch.nn import functional as F


def trades(clean_NK: Tensor, adversarial_NK: Tensor, labels_N: Tensor, beta: float) -> Tensor:
    """Return CE(clean, y) + beta * KL(clean || adversarial), the mean over the batch.

    Zhang et al., "Theoretically principled trade-off between robustness and accuracy", ICML 2019.
    """
    natural = F.cross_entropy(clean_NK, labels_N)
    return natural + beta * divergence(clean_NK, adversarial_NK)


def divergence(p_NK: Tensor, q_NK: Tensor) -> Tensor:
    """Return KL(p || q) of two batches of logits, the mean over the batch."""
    return F.kl_div(
        F.log_softmax(q_NK, dim=1),
        F.log_softmax(p_NK, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def class_routing_loss(scores_NE: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    """Return minus the mutual information of class and expert: -log(E) at best, 0 at a collapse.

    It falls as all images of a class, attacked ones included, go to one expert, and as the
    experts share the images alike; which classes go together is for training to find.
    """
    probability_NE = F.softmax(scores_NE, dim=1)
    member_NK = F.one_hot(labels_N, num_classes).to(probability_NE)
    joint_KE = member_NK.T @ probability_NE / len(labels_N)
    return _entropy(joint_KE) - _entropy(joint_KE.sum(dim=0)) - _entropy(joint_KE.sum(dim=1))


def _entropy(p: Tensor) -> Tensor:
    # Clamped, for a class that a batch lacks has probability 0, whose logarithm has no gradient.
    return -(p * p.clamp(min=1e-12).log()).sum()

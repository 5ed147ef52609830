"""Balancing losses, which keep a gate from sending everything to a few experts.

``switch``, ``entropy``, ``column-entropy`` and ``variance`` are those of Robust Experts (arXiv
2509.05086), ``importance`` and ``load`` those of V-MoE (Riquelme et al., 2021, arXiv 2106.05974).
All take the scores before noise; ``load`` also asks what the noise could have changed. They stay
finite, and so do their gradients, when one expert gets everything.

A gate of hard routes (weighting ``one``) has a gradient only under a surrogate: pass
``Routes(surrogate="probability")``.

Shapes: N rows, E experts, K experts per row.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.models.routing.capacity import NoisyRouting
from advmoe_deploy.models.routing.routing import Routing

_SWEEPS = 100  # over the experts, until their prices stand


def switch_loss(routing: Routing) -> Tensor:
    """Return E * sum_e f_e * P_e - 1: 0 when balanced, E - 1 when one expert has everything.

    f_e is the share of rows whose best expert is e (a constant), P_e its mean probability.
    """
    scores_NE = _clean(routing)
    best_NE = F.one_hot(scores_NE.argmax(dim=1), routing.num_experts).to(scores_NE)
    share_E = best_NE.mean(dim=0)
    return routing.num_experts * (share_E * scores_NE.softmax(dim=1).mean(dim=0)).sum() - 1


def entropy_loss(routing: Routing) -> Tensor:
    """Return the rows' mean entropy - the entropy of their mean: -log(E) at best, else up to 0.

    At best each row is sure of its expert and all experts get the same.
    """
    log_p_NE = _clean(routing).log_softmax(dim=1)
    rows = -(log_p_NE.exp() * log_p_NE).sum(dim=1).mean()
    return rows + column_entropy_loss(routing)


def column_entropy_loss(routing: Routing) -> Tensor:
    """Return minus the entropy of the mean probabilities: -log(E) when balanced, else up to 0."""
    log_p_NE = _clean(routing).log_softmax(dim=1)
    # In log space: a mean probability may underflow to 0, whose logarithm has no gradient.
    log_mean_E = log_p_NE.logsumexp(dim=0) - math.log(len(log_p_NE))
    return (log_mean_E.exp() * log_mean_E).sum()


def variance_loss(routing: Routing) -> Tensor:
    """Return switch + 1 - the mean over experts of their probability's deviation over the rows.

    The deviation, which is rewarded, is 0 for a gate that answers all rows alike.
    """
    p_NE = _clean(routing).softmax(dim=1)
    if len(p_NE) < 2:
        return switch_loss(routing) + 1  # one row deviates from nothing
    # The root of a variance of 0 has no gradient; this small a floor changes nothing else.
    deviation_E = (p_NE.var(dim=0) + torch.finfo(p_NE.dtype).tiny).sqrt()
    return switch_loss(routing) + 1 - deviation_E.mean()


def importance_loss(routing: Routing) -> Tensor:
    """Return the squared coefficient of variation of the experts' summed probabilities."""
    return _squared_variation(_clean(routing).softmax(dim=1).sum(dim=0))


def load_loss(routing: Routing) -> Tensor:
    """Return the squared coefficient of variation of the experts' expected load.

    The load of an expert is the sum over rows of the probability that its score, under fresh noise,
    reaches the K-th best score of the row. The noise is that of the routing, or, where it has none,
    V-MoE's: a standard deviation of 1 / E.
    """
    std = routing.noise_std if isinstance(routing, NoisyRouting) else 1 / routing.num_experts
    k = routing.expert_ids_NK.shape[1]
    threshold_N1 = routing.scores_NE.topk(k, dim=1).values[:, -1:]
    lead_NE = (_clean(routing) - threshold_N1) / std
    return _squared_variation(torch.special.ndtr(lead_NE).sum(dim=0))


def importance_and_load_loss(routing: Routing) -> Tensor:
    """Return the mean of the importance and the load loss, V-MoE's auxiliary loss."""
    return (importance_loss(routing) + load_loss(routing)) / 2


BALANCE_LOSSES: dict[str, Callable[[Routing], Tensor]] = {
    "switch": switch_loss,
    "entropy": entropy_loss,
    "column-entropy": column_entropy_loss,
    "variance": variance_loss,
    "importance": importance_loss,
    "load": load_loss,
    "importance-load": importance_and_load_loss,
}


def even_shift(scores_NE: Tensor) -> Tensor:
    """Return what to add to each expert's scores [E] so that all get as many of these rows.

    The prices of an auction, as in loss-free balancing (Wang et al., 2024, arXiv 2408.15664): each
    expert in turn asks for just so much that its share of the rows prefers it.
    """
    rows, experts = scores_NE.shape
    shift_E = scores_NE.new_zeros(experts)
    for turn in range(_SWEEPS * experts if experts > 2 else 1):  # between two, one price settles it
        expert = turn % experts
        others_NE = scores_NE + shift_E
        others_NE[:, expert] = -torch.inf
        lacks_N = (others_NE.max(dim=1).values - scores_NE[:, expert]).sort().values
        share = rows // experts
        shift_E[expert] = lacks_N[max(share - 1, 0) : share + 1].mean()
    return shift_E - shift_E.mean()


def _clean(routing: Routing) -> Tensor:
    return routing.clean_NE if isinstance(routing, NoisyRouting) else routing.scores_NE


def _squared_variation(x_E: Tensor) -> Tensor:
    return x_E.var(correction=0) / x_E.mean().square()

"""Radius of Theorem 5.4 (Zhang et al., arXiv 2502.06832), for mixtures of whole networks.

For a mixture sum_i a_i(x) f_i(x) of logits with router weights a, the answer y of x stands within

    min over j != y of (F_y(x) - F_j(x)) / sum_i (r_i * M_i + a_i(x) * L_i)

where r_i is the Lipschitz constant of a_i, and M_i and L_i are the bound and the Lipschitz constant
of expert i's *margin* f_y - f_j. (With constants of single logits it would be unsound by a factor
of 2.) A dual model's logits are a blend of two mixtures', and so are its sums.

An arg-max router has no r_i: its weights jump. Inside the ball in which no route changes they are
constant, r_i = 0 and a_i = 1 for the chosen expert, and the theorem holds as far as that ball goes.

Shapes: N images, E experts, K classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from advmoe_deploy.analysis.lipschitz import Lipschitz, margin_bound
from advmoe_deploy.analysis.shares import answers
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.families.dual import DualModel
from advmoe_deploy.models.routing.routing import Routing

_OF_NETWORKS = ("advmoe", "expert-networks", "dual-model")


class _Mixture(NamedTuple):
    """A mixture of the model: the layer of its router, its share, L of each expert or ``None``."""

    layer: str
    share: float
    slopes: tuple[float | None, ...]


def theorem_radius(logits_NK: Tensor, rate_N: Tensor) -> Tensor:
    """Return Theorem 5.4's radius [N] of each image's own answer, of :func:`theorem_rate`."""
    best_N2 = logits_NK.topk(2, dim=1).values
    return (best_N2[:, 0] - best_N2[:, 1]) / rate_N


def theorem_rate(weights_NE: Tensor, r_E: Tensor, bound_E: Tensor, slope_E: Tensor) -> Tensor:
    """Return sum_i (r_i M_i + a_i L_i) for each image [N]; a blend's rates blend as its logits.

    ``r_E`` are Lipschitz constants of the router's weights, ``bound_E`` and ``slope_E`` the bound
    M and the Lipschitz constant L of each expert's margins.
    """
    return (r_E * bound_E).sum() + weights_NE @ slope_E


def held_radius(
    model: Classifier, images: Tensor, route_N: Tensor, lipschitz: Sequence[Lipschitz]
) -> Tensor | str:
    """Return the theorem's radius [N] inside ``route_N``, the routes' radii, or why there is none.

    ``lipschitz`` are the model's constants.
    """
    if model.spec.family not in _OF_NETWORKS:
        return "experts are layers, and the theorem is about mixtures of whole networks"
    logits_NK, taken = answers(model, images)
    rate_N = torch.zeros(len(images), dtype=torch.float64)
    for mixture in _mixtures(model, lipschitz):
        if None in mixture.slopes:
            return "an expert has no global bound"
        slope_E = torch.tensor(mixture.slopes, dtype=torch.float64)
        rate_N += mixture.share * _held_rate(taken[mixture.layer], slope_E)
    return torch.minimum(route_N, theorem_radius(logits_NK.double().cpu(), rate_N))


def _held_rate(routing: Routing, slope_E: Tensor) -> Tensor:
    weights_NE = torch.zeros(routing.scores_NE.shape, dtype=torch.float64)
    weights_NE.scatter_(1, routing.expert_ids_NK.cpu(), 1.0)
    nothing_E = torch.zeros_like(slope_E)  # r_i = 0, so that no M_i matters
    return theorem_rate(weights_NE, nothing_E, nothing_E, slope_E)


def _mixtures(model: Classifier, lipschitz: Sequence[Lipschitz]) -> list[_Mixture]:
    if isinstance(model, DualModel):
        parts = ((model.standard, 1 - model.alpha), (model.robust, model.alpha))
        return [
            _Mixture(
                part.layer,
                share,
                tuple(
                    margin_bound(part, part.forced(expert))[0]
                    for expert in range(len(part.experts))
                ),
            )
            for part, share in parts
        ]
    (rule,) = model.rules
    bound_of = {part.part: part.bound for part in lipschitz}
    # An expert that no row is sent to has a weight of 0, whatever its slope.
    slopes = (
        bound_of.get(f"expert {e}") if e in rule.kept else 0.0 for e in range(rule.num_experts)
    )
    return [_Mixture(rule.layer, 1.0, tuple(slopes))]

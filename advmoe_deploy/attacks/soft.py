"""Soft form of a routed model: each row meets all experts, weighted by a softmax of their scores.

It is another function, whose gradient knows of every expert; what it suggests is tried on the model
itself. Shapes: N images, E experts, K classes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import Routes, Routing, RoutingRule, Surrogate


class SoftForm:
    """``model`` in its soft form; a snapshot: weights that change later are not seen.

    Args:
        model: a model that routes, in eval mode.
        routings: by layer, those of clean images.
        temperature: of the softmax, as a share of the median gap between their routes.
    """

    def __init__(
        self, model: Classifier, routings: Mapping[str, Routing], temperature: float
    ) -> None:
        self._soft = model.unrolled()
        own = {id(parameter) for parameter in model.parameters()}
        for parameter in self._soft.parameters():
            if id(parameter) not in own:  # a copy, which wants no gradient
                parameter.requires_grad_(False)
        self._temperatures = {
            layer: max(temperature * route_gap(routing), 1e-12)
            for layer, routing in routings.items()
        }

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """Return logits [N, K]."""
        routes = Routes(surrogate="probability", adjust=self._blend)
        logits_NK: Tensor = self._soft(images_NCHW, routes)
        return logits_NK

    def _blend(self, rule: RoutingRule, scores_NE: Tensor, _: Surrogate | None) -> Routing:
        weights_NE = F.softmax(scores_NE / self._temperatures[rule.layer], dim=1)
        experts_E = torch.arange(rule.num_experts, device=scores_NE.device)
        return Routing(scores_NE, experts_E.expand_as(scores_NE), weights_NE)


def route_gap(routing: Routing) -> float:
    """Return the median distance, in scores, of rows from another route; 1 where there is none."""
    gaps_R = routing.margin_N
    gaps_R = gaps_R[torch.isfinite(gaps_R)]
    return float(gaps_R.median()) if len(gaps_R) else 1.0

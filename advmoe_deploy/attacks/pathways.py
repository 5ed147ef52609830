"""Pathways of a routed model: which expert every row of every layer is to meet.

Shapes: N images, T routed rows per image (1, or its tokens), E experts, K classes.
"""

import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from advmoe_deploy.attacks.losses import lead_over_label
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import (
    Routes,
    Routing,
    RoutingRule,
    Surrogate,
    choose,
    forced_route,
)

# The expert [N, T] of each row, by layer; a layer that is not named goes on choosing for itself.
Pathway = Mapping[str, Tensor]

# So many combinations of the layers' experts are all tried; of more, a selection.
MOST_COMBINATIONS = 16


def pathways_of(model: Classifier, clean: Mapping[str, Routing], images: int) -> list[Pathway]:
    """Return the pathways to try on ``images`` images whose clean routings are ``clean``.

    They are all combinations of the layers' experts; where those are too many, the same expert
    throughout and, a layer at a time, each row's second choice.
    """
    if math.prod(len(rule.kept) for rule in model.rules) <= MOST_COMBINATIONS:
        return combinations(model, clean, images)
    same: list[Pathway] = [
        {r.layer: _everywhere(r.or_last(expert), clean[r.layer], images) for r in model.rules}
        for expert in model.experts_in_use
    ]
    return same + [{r.layer: _second_choice(clean[r.layer], images)} for r in model.rules]


def combinations(model: Classifier, clean: Mapping[str, Routing], images: int) -> list[Pathway]:
    """Return one pathway for each combination of the layers' experts."""
    layers = [rule.layer for rule in model.rules]
    return [
        {
            layer: _everywhere(expert, clean[layer], images)
            for layer, expert in zip(layers, experts, strict=True)
        }
        for experts in itertools.product(*(rule.kept for rule in model.rules))
    ]


@torch.no_grad()
def weakest_pathway(
    model: Classifier, pathways: list[Pathway], images_NCHW: Tensor, labels_N: Tensor
) -> Pathway:
    """Return, image by image, that of ``pathways`` whose network errs most; all name all layers."""
    everyone_N = torch.arange(len(labels_N), device=labels_N.device)
    leads_PN = torch.stack(
        [
            lead_over_label(model(images_NCHW, forced(pathway, everyone_N)), labels_N)
            for pathway in pathways
        ]
    )
    worst_N = leads_PN.argmax(dim=0)
    return {
        layer: torch.stack([pathway[layer] for pathway in pathways])[worst_N, everyone_N]
        for layer in pathways[0]
    }


def forced(
    pathway: Pathway, rows_N: Tensor, saw: Callable[[Tensor], None] = lambda _: None
) -> Routes:
    """Return routes that send the images ``rows_N`` of a batch along ``pathway``.

    ``saw`` is told by how much each row's score leads the others' [N * T], a layer at a time.
    """

    def force(rule: RoutingRule, scores_NE: Tensor, surrogate: Surrogate | None) -> Routing:
        if rule.layer not in pathway:
            return choose(scores_NE, rule, surrogate)
        ids_R = pathway[rule.layer][rows_N].flatten()
        saw(_lead(scores_NE, ids_R))
        return forced_route(ids_R, rule.num_experts, like=scores_NE)

    return Routes(surrogate="probability", adjust=force)


def _lead(scores_NE: Tensor, ids_N: Tensor) -> Tensor:
    others_NE = scores_NE.scatter(1, ids_N[:, None], -torch.inf)
    return scores_NE.gather(1, ids_N[:, None])[:, 0] - others_NE.amax(dim=1)


def _everywhere(expert: int, routing: Routing, images: int) -> Tensor:
    rows = len(routing.scores_NE) // images
    return torch.full((images, rows), expert, device=routing.scores_NE.device)


def _second_choice(routing: Routing, images: int) -> Tensor:
    return routing.scores_NE.topk(2, dim=1).indices[:, 1].view(images, -1)

"""Pathways of a routed model: which expert every row of every layer is to meet.

Shapes: N images, T routed rows per image (1, or its tokens), E experts, K classes.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

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


def whole_pathways(model: Classifier, clean: Mapping[str, Routing], images: int) -> list[Pathway]:
    """Return pathways through all layers, for ``images`` images whose routings are ``clean``.

    They are all combinations of the layers' experts or, where those are too many, the same expert
    throughout.
    """
    rules = model.rules
    experts: Iterable[Sequence[int]] = itertools.product(*(rule.kept for rule in rules))
    if not _has_few_combinations(model):
        experts = ([rule.or_last(expert) for rule in rules] for expert in model.experts_in_use)

    def everywhere(layer: str, expert: int) -> Tensor:
        scores_RE = clean[layer].scores_NE
        return torch.full((images, len(scores_RE) // images), expert, device=scores_RE.device)

    layers = [rule.layer for rule in rules]
    return [
        {layer: everywhere(layer, e) for layer, e in zip(layers, chosen, strict=True)}
        for chosen in experts
    ]


def second_choices(model: Classifier, clean: Mapping[str, Routing], images: int) -> list[Pathway]:
    """Return, where not all combinations are tried, a layer at a time each row's next choice.

    That is the best expert that the row does not meet already.
    """
    return [
        {r.layer: clean[r.layer].scores_NE.topk(r.top_k + 1, dim=1).indices[:, -1].view(images, -1)}
        for r in _layers_with_a_choice(model)
    ]


def count_pathways(model: Classifier) -> int:
    """Return how many pathways are tried, second choices included."""
    return count_whole_pathways(model) + len(_layers_with_a_choice(model))


def count_whole_pathways(model: Classifier) -> int:
    """Return how many pathways go through all layers."""
    return _combinations(model) if _has_few_combinations(model) else len(model.experts_in_use)


def _layers_with_a_choice(model: Classifier) -> list[RoutingRule]:
    """Return the layers whose second choices are tried."""
    if _has_few_combinations(model):
        return []
    return [rule for rule in model.rules if len(rule.kept) > rule.top_k]


def _has_few_combinations(model: Classifier) -> bool:
    return _combinations(model) <= MOST_COMBINATIONS


def _combinations(model: Classifier) -> int:
    return math.prod(len(rule.kept) for rule in model.rules)


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

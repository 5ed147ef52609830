"""Operators that mark, in a traced model, where rows are routed, sent to experts and combined.

They are how the exporter finds the places to cut; each also computes what it stands for, so that a
traced model still runs and can be compared. Every expert then sees every row.

Shapes: N rows (images, or tokens), E experts, K experts per row.
"""

import torch
from torch import Tensor

from advmoe_deploy.models.routing.routing import RoutingRule, choose
from advmoe_deploy.specs import Weighting


def mark_route(scores_NE: Tensor, rule: RoutingRule) -> tuple[Tensor, Tensor]:
    """Return ids and weights [N, K] by ``rule``; the trace remembers the rule."""
    ids_NK, weights_NK = _route(scores_NE, rule.layer, rule.top_k, rule.weighting)
    return ids_NK, weights_NK


def mark_experts(expert_ids_NK: Tensor, weights_NK: Tensor, outputs: list[Tensor]) -> Tensor:
    """Return sum over k of weight * output of the expert, from the outputs of all experts."""
    combined: Tensor = _combine(expert_ids_NK, weights_NK, outputs)
    return combined


def mark_input(x: Tensor, expert: int) -> Tensor:
    """Return ``x``; in the trace, what follows up to the combination belongs to ``expert``."""
    marked: Tensor = _dispatch(x, expert)
    return marked


@torch.library.custom_op("advmoe::route", mutates_args=())
def _route(scores: Tensor, layer: str, top_k: int, weighting: str) -> tuple[Tensor, Tensor]:
    kind: Weighting = weighting  # type: ignore[assignment]
    routing = choose(scores, RoutingRule(layer, scores.shape[1], top_k, kind))
    return routing.expert_ids_NK.contiguous(), routing.weights_NK.contiguous()


@_route.register_fake
def _(scores: Tensor, layer: str, top_k: int, weighting: str) -> tuple[Tensor, Tensor]:
    chosen = scores.new_empty(scores.shape[0], top_k)
    return chosen.to(torch.int64), chosen


@torch.library.custom_op("advmoe::dispatch", mutates_args=())
def _dispatch(x: Tensor, expert: int) -> Tensor:
    return x.clone()


@_dispatch.register_fake
def _(x: Tensor, expert: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("advmoe::combine", mutates_args=())
def _combine(expert_ids: Tensor, weights: Tensor, outputs: list[Tensor]) -> Tensor:
    weights_NE = weights.new_zeros(len(weights), len(outputs)).scatter_add(1, expert_ids, weights)
    return torch.stack(
        [
            output * weight_N.view(-1, *([1] * (output.dim() - 1)))
            for output, weight_N in zip(outputs, weights_NE.unbind(1), strict=True)
        ]
    ).sum(dim=0)


@_combine.register_fake
def _(expert_ids: Tensor, weights: Tensor, outputs: list[Tensor]) -> Tensor:
    return torch.empty_like(outputs[0])

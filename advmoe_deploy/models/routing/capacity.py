"""Capacity and noise: changes to a choice of experts in training and analysis.

An :class:`Adjust` goes into ``Routes(adjust=...)``. The deployed model has neither: every row goes
where its scores send it.

Shapes: N rows, E experts, K experts per row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.routing.routing import Routing, RoutingRule, Surrogate, choose, weights_of

Overflow = Literal["reassign", "drop"]


@dataclass(frozen=True)
class NoisyRouting(Routing):
    """A choice made from noisy scores; ``clean_NE`` are the scores before, for balancing losses."""

    clean_NE: Tensor
    noise_std: float


@dataclass(frozen=True)
class Adjust:
    """Noise and capacity for a choice of experts; called as ``Routes`` calls its ``adjust``.

    Args:
        noise: standard deviation of what is added to the raw scores (Robust Experts: 0.1; V-MoE:
            1 / E). The choice and its weights come from the noisy scores.
        capacity_factor: each expert takes at most ceil(factor * N * K / E) rows, E those that are
            not dropped; ``None`` for any number.
        overflow: what becomes of a row whose expert is full. ``reassign`` (Robust Experts, arXiv
            2509.05086): its next best expert with room; for a factor of 1 or more all rows find K.
            ``drop`` (V-MoE, arXiv 2106.05974): that choice gets weight 0; first choices are
            served before second ones.
        prioritised: serve rows by their highest probability instead of by their place in the
            batch (V-MoE's batch priority).
        normal: called with the scores, returns standard normal numbers of their shape.

    Raises:
        UsageError: a setting makes no sense.
    """

    noise: float = 0.0
    capacity_factor: float | None = None
    overflow: Overflow = "reassign"
    prioritised: bool = False
    normal: Callable[[Tensor], Tensor] = torch.randn_like

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise UsageError(f"gate noise must be finite and at least 0, not {self.noise}")
        least = 1.0 if self.overflow == "reassign" else 0.0
        factor = self.capacity_factor
        if factor is not None and not (math.isfinite(factor) and factor > 0 and factor >= least):
            raise UsageError(
                f"capacity_factor={factor} leaves rows without an expert; use at least 1, "
                "or above 0 with overflow 'drop'"
            )

    def __call__(
        self, rule: RoutingRule, scores_NE: Tensor, surrogate: Surrogate | None
    ) -> Routing:
        """Return the routing of rows with these raw scores."""
        noisy_NE = self._noisy(scores_NE)
        routing = choose(noisy_NE, rule, surrogate)
        if self.capacity_factor is not None:
            rows = len(scores_NE)
            capacity = math.ceil(self.capacity_factor * rows * rule.top_k / len(rule.kept))
            routing = self._limited(routing, min(capacity, rows), rule, surrogate)
        if not self.noise:
            return routing
        return NoisyRouting(
            noisy_NE, routing.expert_ids_NK, routing.weights_NK, scores_NE, self.noise
        )

    def _noisy(self, scores_NE: Tensor) -> Tensor:
        if not self.noise:
            return scores_NE
        return scores_NE + self.noise * self.normal(scores_NE)

    def _limited(
        self, routing: Routing, capacity: int, rule: RoutingRule, surrogate: Surrogate | None
    ) -> Routing:
        scores_NE = routing.scores_NE
        order_N = _serving_order(scores_NE, prioritised=self.prioritised)
        if self.overflow == "drop":
            kept_NK = torch.empty_like(routing.expert_ids_NK, dtype=torch.bool)
            kept_NK[order_N] = _within(
                routing.expert_ids_NK[order_N], routing.num_experts, capacity
            )
            return Routing(scores_NE, routing.expert_ids_NK, routing.weights_NK * kept_NK)
        ids_NK = torch.empty_like(routing.expert_ids_NK)
        ids_NK[order_N] = reassigned(scores_NE[order_N], rule.top_k, capacity, rule.dropped)
        return Routing(scores_NE, ids_NK, weights_of(scores_NE, ids_NK, rule, surrogate))


def _serving_order(scores_NE: Tensor, *, prioritised: bool) -> Tensor:
    if not prioritised:
        return torch.arange(len(scores_NE), device=scores_NE.device)
    top_N = scores_NE.softmax(dim=1).amax(dim=1)
    return top_N.argsort(descending=True, stable=True)


def _within(ids_NK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Return which choices [N, K] find room: all first choices are served, then all second ones."""
    slots = ids_NK.T.flatten()
    chosen = torch.nn.functional.one_hot(slots, num_experts)
    place = chosen.cumsum(dim=0).gather(1, slots[:, None]).view(ids_NK.shape[1], -1)
    return (place <= capacity).T


@torch.no_grad()
def reassigned(
    scores_NE: Tensor, top_k: int, capacity: int, dropped: tuple[int, ...] = ()
) -> Tensor:
    """Return ids [N, K], best first: rows choose in turn among the experts that have room.

    Those ``dropped`` have none; ``capacity`` times the others must be at least N * K. Every row
    gets K different experts and none more than ``capacity`` rows. Towards the end a row must at
    times take an expert that is not its best, so that the rows after it still find K *different*
    ones; that happens only if it is unavoidable.
    """
    order_NE = scores_NE.argsort(dim=1, descending=True, stable=True)
    room_E = torch.full_like(order_NE[0], capacity)
    room_E[list(dropped)] = 0
    parts = []
    served = 0
    while served < len(order_NE):
        picks_RE = _picks(order_NE[served:], room_E, top_k)
        count = _servable(picks_RE, room_E, top_k)
        if count == 0:
            picks_RE = _one_forced_pick(order_NE[served], room_E, len(picks_RE), top_k)
            count = 1
        parts.append(picks_RE[:count])
        room_E = room_E - parts[-1].sum(dim=0)
        served += count
    picked_NE = torch.cat(parts)
    # Ids of the picked experts in each row's own order of preference.
    ranked_NE = picked_NE.gather(1, order_NE)
    return order_NE[ranked_NE].view(-1, top_k)


def _spare(room_E: Tensor, rows: Tensor | int, top_k: int) -> Tensor:
    """Return how many places are left over once ``rows`` rows have K different experts each."""
    rows = torch.as_tensor(rows, device=room_E.device)
    return torch.minimum(room_E, rows[..., None]).sum(dim=-1) - top_k * rows


def _picks(order_RE: Tensor, room_E: Tensor, top_k: int) -> Tensor:
    """Return the picks [R, E] of all remaining rows, as if room lasted: must-haves, then best."""
    rows = len(order_RE)
    must_E = (room_E >= rows) & (_spare(room_E, rows, top_k) == 0)
    free_RE = ((room_E > 0) & ~must_E)[order_RE]
    best_RE = free_RE & (free_RE.cumsum(dim=1) <= top_k - must_E.sum())
    return torch.zeros_like(best_RE).scatter(1, order_RE, best_RE) | must_E


def _servable(picks_RE: Tensor, room_E: Tensor, top_k: int) -> int:
    """Return how many rows can have their picks before one of them finds no room or takes too much.

    It takes too much if the rows after it could no longer find K different experts.
    """
    rows = torch.arange(len(picks_RE), 0, -1, device=room_E.device)
    before_RE = room_E - (picks_RE.cumsum(dim=0) - picks_RE.long())
    ample_RE = before_RE >= rows[:, None]
    needed_R = ample_RE.sum(dim=1) - _spare(before_RE, rows, top_k)
    bad_R = (picks_RE & (before_RE < 1)).any(dim=1) | ((picks_RE & ample_RE).sum(dim=1) < needed_R)
    return int(bad_R.int().argmax()) if bool(bad_R.any()) else len(picks_RE)


def _one_forced_pick(order_E: Tensor, room_E: Tensor, rows: int, top_k: int) -> Tensor:
    """Return the picks [1, E] of a row that has to take some experts which have ample room."""
    ample_E = (room_E >= rows)[order_E]
    needed = int(ample_E.sum() - _spare(room_E, rows, top_k))
    forced_E = ample_E & (ample_E.cumsum(dim=0) <= needed)
    others_E = (room_E > 0)[order_E] & ~forced_E
    best_E = others_E & (others_E.cumsum(dim=0) <= top_k - needed)
    return torch.zeros_like(best_E).scatter(0, order_E, forced_E | best_E)[None]

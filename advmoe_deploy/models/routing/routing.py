"""Routing rules of layers, the choices of experts they make, and ways to overrule them.

Shapes: N rows (images, or tokens), E experts, K experts per row.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.plan import RENORMALISER
from advmoe_deploy.pruning import DROPPED
from advmoe_deploy.specs import Weighting

Execution = Literal["grouped", "masked", "traced"]
Surrogate = Literal["probability", "score"]


@dataclass(frozen=True)
class RoutingRule:
    """Rule by which one layer turns scores into a route; the plan says the same to every engine.

    ``weighting`` of the chosen experts: ``one`` is 1 (top-1 only), ``probability`` their softmax
    over all experts, ``renormalised`` that divided by its sum over the chosen. No row is ever sent
    to the experts in ``dropped``.
    """

    layer: str
    num_experts: int
    top_k: int = 1
    weighting: Weighting = "one"
    dropped: tuple[int, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """The experts that rows can be sent to, ascending."""
        return tuple(e for e in range(self.num_experts) if e not in self.dropped)

    def or_last(self, expert: int) -> int:
        """Return ``expert``, or the last one that is kept where no row can be sent to it."""
        return expert if expert in self.kept else self.kept[-1]

    def masked(self, scores_NE: Tensor) -> Tensor:
        """Return ``scores_NE`` with those of the dropped experts below all others."""
        if not self.dropped:
            return scores_NE
        # Added, not filled in: a sum has a bound where bounds are computed instead of values.
        mask_E = torch.zeros(self.num_experts, dtype=scores_NE.dtype, device=scores_NE.device)
        mask_E[list(self.dropped)] = DROPPED
        return scores_NE + mask_E


@dataclass(frozen=True)
class Routing:
    """A router's answer for one batch: raw scores, chosen ids best first, and their weights."""

    scores_NE: Tensor
    expert_ids_NK: Tensor
    weights_NK: Tensor

    @property
    def num_experts(self) -> int:
        """Number of experts that were scored."""
        return self.scores_NE.shape[1]

    @property
    def expert_load_E(self) -> Tensor:
        """Choices per expert, int64; each row counts K times."""
        return torch.bincount(self.expert_ids_NK.flatten(), minlength=self.num_experts)

    @property
    def margin_N(self) -> Tensor:
        """Distance between the last score that was chosen and the first that was not.

        Infinite where no other expert could have been chosen.
        """
        k = self.expert_ids_NK.shape[1]
        if k == self.num_experts:
            return torch.full_like(self.scores_NE[:, 0], torch.inf)
        best = self.scores_NE.topk(k + 1, dim=1).values
        margin_N = best[:, k - 1] - best[:, k]
        return torch.where(best[:, k] <= DROPPED / 2, torch.inf, margin_N)


def choose(scores_NE: Tensor, rule: RoutingRule, surrogate: Surrogate | None = None) -> Routing:
    """Return the route by ``rule``; ties go to the lowest index.

    Where a weight is the constant 1, ``surrogate`` gives it a gradient nevertheless
    (straight-through): that of the chosen expert's softmax probability, or, as AdvMoE's released
    code has it, of its raw score.
    """
    # Stable, for topk and argmax promise no order between equals on every device.
    ids_NK = scores_NE.argsort(dim=1, descending=True, stable=True)[:, : rule.top_k]
    return Routing(scores_NE, ids_NK, weights_of(scores_NE, ids_NK, rule, surrogate))


def weights_of(
    scores_NE: Tensor, ids_NK: Tensor, rule: RoutingRule, surrogate: Surrogate | None = None
) -> Tensor:
    """Return the weights [N, K] that ``rule`` gives the experts ``ids_NK``."""
    if rule.weighting == "one" and surrogate is None:
        return torch.ones_like(scores_NE[:, : ids_NK.shape[1]])
    values_NE = scores_NE if surrogate == "score" else F.softmax(scores_NE, dim=1)
    chosen_NK = values_NE.gather(1, ids_NK)
    if rule.weighting == "one":
        return 1 + (chosen_NK - chosen_NK.detach())
    if rule.weighting == "probability":
        return chosen_NK
    return chosen_NK / (chosen_NK.sum(dim=1, keepdim=True) + RENORMALISER)


def forced_route(expert_ids_N: Tensor, num_experts: int, *, like: Tensor) -> Routing:
    """Return the routing that sends row n to ``expert_ids_N[n]`` alone, with weight 1."""
    scores_NE = F.one_hot(expert_ids_N, num_experts).to(like.dtype)
    ids_NK = expert_ids_N[:, None]
    return Routing(scores_NE, ids_NK, torch.ones_like(scores_NE[:, :1]))


class Routes:
    """The routings of one forward pass: every routed layer asks here, and the answers stay.

    Pass one to ``model(images, routes)`` to see the routes (:attr:`taken`), to overrule them, or to
    change how they are executed. A model without one makes its own.

    Args:
        forced: by layer, a routing to use instead of asking the gate, or an expert for all rows.
        surrogate: the straight-through gradient of hard routes, ``None`` for none: the gradient is
            then exactly that of the deployed function.
        execution: ``grouped``, ``masked`` or, for the exporter only, ``traced``; see
            :mod:`~advmoe_deploy.models.routing.dispatch`.
        adjust: called with (rule, scores) before the choice; returns the routing. For what only
            training or analysis does: noise, capacity.
    """

    def __init__(
        self,
        forced: Mapping[str, Routing | int] | None = None,
        *,
        surrogate: Surrogate | None = None,
        execution: Execution = "grouped",
        adjust: Callable[[RoutingRule, Tensor, Surrogate | None], Routing] = (
            lambda rule, scores_NE, surrogate: choose(scores_NE, rule, surrogate)
        ),
    ) -> None:
        self.forced = dict(forced or {})
        self.surrogate = surrogate
        self.execution: Execution = execution
        self.adjust = adjust
        self.taken: dict[str, Routing] = {}

    def decide(self, rule: RoutingRule, gate: Callable[[Tensor], Tensor], x: Tensor) -> Routing:
        """Return the routing of the rows ``x`` at the layer of ``rule``, and remember it.

        A gate whose gradient nobody wants runs without one; an overruled gate does not run.
        """
        routing = self.forced.get(rule.layer)
        if isinstance(routing, int):
            ids_N = torch.full((len(x),), routing, dtype=torch.int64, device=x.device)
            routing = forced_route(ids_N, rule.num_experts, like=x)
        elif routing is None:
            hard = rule.weighting == "one" and self.surrogate is None
            with torch.no_grad() if hard else nullcontext():
                routing = self.adjust(rule, rule.masked(gate(x)), self.surrogate)
        self.taken[rule.layer] = routing
        return routing

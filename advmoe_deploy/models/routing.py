"""Which experts each row goes to, and two ways to execute that choice.

Shapes: N rows, E experts, K experts per row, C channels, H height, W width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Execution = Literal["grouped", "masked"]


@dataclass(frozen=True)
class Routing:
    """A router's answer for one batch.

    ``weights_NK`` is 1 for a top-1 route; while gradients are recorded it also carries the
    straight-through gradient into the scores.
    """

    scores_NE: Tensor
    expert_ids_NK: Tensor
    weights_NK: Tensor

    @property
    def num_experts(self) -> int:
        """Number of experts that were scored."""
        return self.scores_NE.shape[1]

    @property
    def expert_load_E(self) -> Tensor:
        """Rows per expert, int64."""
        return torch.bincount(self.expert_ids_NK.flatten(), minlength=self.num_experts)

    @property
    def margin_N(self) -> Tensor:
        """Distance between the best and the second best score of each row."""
        best = self.scores_NE.topk(2, dim=1).values
        return best[:, 0] - best[:, 1]


def route_top_1(scores_NE: Tensor) -> Routing:
    """Return the arg-max route; ties go to the lowest index.

    The weight equals 1; its gradient is that of the chosen expert's softmax probability
    (straight-through), so a loss of the model's output reaches the router.
    """
    ids_NK = scores_NE.argmax(dim=1, keepdim=True)
    ones_NK = torch.ones_like(scores_NE[:, :1])
    if not (torch.is_grad_enabled() and scores_NE.requires_grad):
        return Routing(scores_NE, ids_NK, ones_NK)
    probability_NK = F.softmax(scores_NE, dim=1).gather(1, ids_NK)
    return Routing(scores_NE, ids_NK, ones_NK + (probability_NK - probability_NK.detach()))


def forced_route(expert_ids_N: Tensor, num_experts: int, *, like: Tensor) -> Routing:
    """Return the routing that sends row n to ``expert_ids_N[n]``, whatever a router would say."""
    scores_NE = F.one_hot(expert_ids_N, num_experts).to(like.dtype)
    ids_NK = expert_ids_N[:, None]
    return Routing(scores_NE, ids_NK, torch.ones_like(scores_NE[:, :1]))


class Dispatch:
    """One batch's routing, made ready for the routed layers of one forward pass.

    ``masked`` computes every expert on every row and then selects: the papers' layer and our
    reference. ``grouped`` sorts the rows by expert once, runs each expert on its own rows only, and
    restores the order at the end. Layers shared by the experts, BatchNorm above all, see the whole
    batch either way, so both give the same outputs and the same gradients.
    """

    def __init__(self, routing: Routing, execution: Execution) -> None:
        self.routing = routing
        self.execution = execution
        ids_N = routing.expert_ids_NK[:, 0]
        self.order_N = ids_N.argsort(stable=True)
        self.rows_per_expert: list[int] = (
            routing.expert_load_E.tolist() if execution == "grouped" else []
        )

    def dispatch(self, rows: Tensor) -> Tensor:
        """Return ``rows`` in the order the routed layers expect."""
        return rows[self.order_N] if self.execution == "grouped" else rows

    def combine(self, rows: Tensor) -> Tensor:
        """Return ``rows`` in the batch's own order again."""
        if self.execution == "masked":
            return rows
        return torch.empty_like(rows).index_copy(0, self.order_N, rows)

    def conv2d(self, x_NCHW: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        """Return each row's convolution with its own expert, times its routing weight.

        ``weight`` is [E * C_out, C_in, kh, kw]; expert e owns the e-th run of C_out rows.
        """
        run = self._grouped_conv2d if self.execution == "grouped" else self._masked_conv2d
        y_NCHW = run(x_NCHW, weight, stride, padding)
        weights_NK = self.routing.weights_NK
        if not weights_NK.requires_grad:
            return y_NCHW  # a top-1 weight is exactly 1
        return y_NCHW * self.dispatch(weights_NK)[:, :1, None, None]

    def _grouped_conv2d(self, x_NCHW: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        experts = weight.chunk(self.routing.num_experts)
        parts = zip(torch.split(x_NCHW, self.rows_per_expert), experts, strict=True)
        return torch.cat(
            [F.conv2d(x, w, stride=stride, padding=padding) for x, w in parts if len(x)]
        )

    def _masked_conv2d(self, x_NCHW: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        all_experts = F.conv2d(x_NCHW, weight, stride=stride, padding=padding)
        n, _, height, width = all_experts.shape
        y_NECHW = all_experts.view(n, self.routing.num_experts, -1, height, width)
        ids_N = self.routing.expert_ids_NK[:, 0]
        return y_NECHW[torch.arange(n, device=ids_N.device), ids_N]


@contextmanager
def frozen_parameters(module: torch.nn.Module) -> Iterator[None]:
    """Record no gradients for the parameters of ``module`` inside the block (attacks want none)."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)

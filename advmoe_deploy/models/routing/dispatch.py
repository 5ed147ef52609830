"""Dispatch of rows to their experts and combination of their answers, in several executions.

``masked`` computes every expert on every row and then selects: the papers' layers and our
reference. ``grouped`` runs each expert on its own rows only. Both give the same outputs and the
same gradients; what experts share, BatchNorm above all, sees the whole batch either way. ``traced``
is ``masked`` with markers, from which the exporter learns what belongs to which expert.

Shapes: N rows, E experts, K experts per row, C channels, H height, W width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from advmoe_deploy.models.routing.markers import mark_experts, mark_input
from advmoe_deploy.models.routing.routing import Execution, Routing

Expert = Callable[[Tensor], Tensor]


def run_experts(
    routing: Routing, x: Tensor, experts: Sequence[Expert], execution: Execution
) -> Tensor:
    """Return sum over k of weight * expert(row) for each row of ``x`` [N, ...].

    Each expert is any callable on rows; one without rows does not run when grouped.
    """
    run = {"grouped": _grouped, "masked": _masked, "traced": _traced}[execution]
    return run(routing, x, experts)


def _grouped(routing: Routing, x: Tensor, experts: Sequence[Expert]) -> Tensor:
    ids_NK, weights_NK = routing.expert_ids_NK, routing.weights_NK
    rows, parts = [], []
    for expert, run in enumerate(experts):
        row_R, slot_R = (ids_NK == expert).nonzero(as_tuple=True)
        if len(row_R) or _others_may_have_rows():
            y = run(x[row_R])
            rows.append(row_R)
            parts.append(y * _beside(weights_NK[row_R, slot_R], y))
    grouped = torch.cat(parts)
    combined = grouped.new_zeros(len(x), *grouped.shape[1:])
    return combined.index_add(0, torch.cat(rows), grouped)


def _others_may_have_rows() -> bool:
    """Return whether an expert without rows must run: another process may wait in its BatchNorm."""
    return distributed.is_initialized() and distributed.get_world_size() > 1


def _masked(routing: Routing, x: Tensor, experts: Sequence[Expert]) -> Tensor:
    weights_NE = torch.zeros_like(routing.scores_NE).to(routing.weights_NK)
    weights_NE = weights_NE.scatter_add(1, routing.expert_ids_NK, routing.weights_NK)
    outputs = (run(x) for run in experts)
    return torch.stack(
        [y * _beside(w_N, y) for y, w_N in zip(outputs, weights_NE.unbind(1), strict=True)]
    ).sum(dim=0)


def _traced(routing: Routing, x: Tensor, experts: Sequence[Expert]) -> Tensor:
    outputs = [run(mark_input(x, expert)) for expert, run in enumerate(experts)]
    return mark_experts(routing.expert_ids_NK, routing.weights_NK, outputs)


def _beside(weights_N: Tensor, y: Tensor) -> Tensor:
    return weights_N.to(y.dtype).view(-1, *([1] * (y.dim() - 1)))


class Dispatch:
    """One top-1 routing, made ready for all the banks of convolutions that follow it (AdvMoE).

    Rows are sorted by expert once, before the first layer, and restored after the last.
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

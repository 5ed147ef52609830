"""The tail of a router as one GPU kernel: from scores to ids and weights.

What the custom operators ``Router*`` do on a CPU (:mod:`advmoe_deploy.export.ops.bodies`), for
TensorRT's quick deployable plugins and for timing it against TensorRT's own layers, which do the
same and are what engines use unless this is faster. Needs Triton; TRITON_INTERPRET=1 runs it on a
CPU.

Shapes: R rows, E experts, K experts per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from advmoe_deploy.plan import RENORMALISER
from advmoe_deploy.specs import Weighting

_ROWS_PER_PROGRAM = 32


@triton.jit
def router_kernel(
    scores_RE,
    ids_RK,
    weights_RK,
    rows,
    experts,
    epsilon,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RENORMALISED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Write the K best experts of each row, ties to the lowest index, and their weights."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert = tl.arange(0, BLOCK_E)
    inside = row < rows
    known = inside[:, None] & (expert < experts)[None, :]
    places = row[:, None] * experts + expert[None, :]
    scores = tl.load(
        scores_RE + places, mask=known, other=-3.0e38
    )  # finite: no row is all infinite
    powers = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    shares = powers / tl.sum(powers, axis=1)[:, None]
    divisor = tl.full((BLOCK_R,), 1.0, tl.float32)
    if RENORMALISED:
        total = tl.zeros((BLOCK_R,), tl.float32)
        left = scores
        for _ in tl.static_range(K):
            chosen = tl.argmax(left, axis=1, tie_break_left=True)[:, None] == expert[None, :]
            total += tl.sum(tl.where(chosen, shares, 0.0), axis=1)
            left = tl.where(chosen, float("-inf"), left)
        divisor = total + epsilon
    left = scores
    for k in tl.static_range(K):
        best = tl.argmax(left, axis=1, tie_break_left=True)
        chosen = best[:, None] == expert[None, :]
        weight = tl.full((BLOCK_R,), 1.0, tl.float32)
        if WEIGHTED:
            weight = tl.sum(tl.where(chosen, shares, 0.0), axis=1) / divisor
        tl.store(ids_RK + row * K + k, best.to(tl.int32), mask=inside)
        tl.store(weights_RK + row * K + k, weight, mask=inside)
        left = tl.where(chosen, float("-inf"), left)


def route_rows(scores_RE: Tensor, top_k: int, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """Return ids int32 [R, K], best first, and weights float32 [R, K].

    The rule is that of :class:`~advmoe_deploy.plan.RouteStep`; scores are finite and float32.
    """
    rows, experts = scores_RE.shape
    ids_RK = torch.empty((rows, top_k), dtype=torch.int32, device=scores_RE.device)
    weights_RK = torch.empty((rows, top_k), dtype=torch.float32, device=scores_RE.device)
    grid = (triton.cdiv(rows, _ROWS_PER_PROGRAM),)
    router_kernel[grid](
        scores_RE.contiguous(),
        ids_RK,
        weights_RK,
        rows,
        experts,
        RENORMALISER,
        K=top_k,
        WEIGHTED=weighting != "one",
        RENORMALISED=weighting == "renormalised",
        BLOCK_R=_ROWS_PER_PROGRAM,
        BLOCK_E=triton.next_power_of_2(experts),
    )
    return ids_RK, weights_RK

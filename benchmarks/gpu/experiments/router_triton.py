"""The tail of a router as one GPU kernel: from scores to ids and weights.

The custom operators ``Router*`` of CPUs (:mod:`advmoe_deploy.export.graph.op_bodies`), for a
TensorRT plugin and for timing it against TensorRT's own layers, which do the same and are what
engines use unless this is faster. Needs Triton; TRITON_INTERPRET=1 runs it on a CPU. Compiling it
ahead of time needs neither a GPU nor PyTorch.

Shapes: R rows, E experts, K experts per row.
"""

import re
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.plan import RENORMALISER, RouteStep
from advmoe_deploy.specs import Weighting
from benchmarks.gpu.experiments.router_plugin import RouterKernel

if TYPE_CHECKING:
    from torch import Tensor

_ROWS_PER_PROGRAM = 32
# As TensorRT gives them: what is read, then numbers, then what is written.
_PARAMETERS = {"scores_RE": "*fp32", "rows": "i32", "ids_RK": "*i32", "weights_RK": "*fp32"}


@triton.jit  # type: ignore[untyped-decorator]
def router_kernel(  # type: ignore[no-untyped-def]
    scores_RE,
    rows,
    ids_RK,
    weights_RK,
    E: tl.constexpr,
    K: tl.constexpr,
    EPSILON: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RENORMALISED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Write the K best experts of each row, ties to the lowest index, and their weights."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert = tl.arange(0, BLOCK_E)
    inside = row < rows
    known = inside[:, None] & (expert < E)[None, :]
    places = row[:, None] * E + expert[None, :]
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
        divisor = total + EPSILON
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


def route_rows(scores_RE: "Tensor", top_k: int, weighting: Weighting) -> tuple["Tensor", "Tensor"]:
    """Return ids int32 [R, K], best first, and weights float32 [R, K].

    The rule is that of :class:`~advmoe_deploy.plan.RouteStep`; scores are finite and float32.
    """
    import torch

    rows, experts = scores_RE.shape
    ids_RK = torch.empty((rows, top_k), dtype=torch.int32, device=scores_RE.device)
    weights_RK = torch.empty((rows, top_k), dtype=torch.float32, device=scores_RE.device)
    grid = (triton.cdiv(rows, _ROWS_PER_PROGRAM),)
    router_kernel[grid](
        scores_RE.contiguous(), rows, ids_RK, weights_RK, **_constants(experts, top_k, weighting)
    )
    return ids_RK, weights_RK


def compiled_router(route: RouteStep, compute_capability: tuple[int, int]) -> RouterKernel:
    """Return the kernel for ``route``, compiled for GPUs of ``compute_capability``.

    Raises:
        CheckFailedError: this Triton compiles it to something that TensorRT cannot launch.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = _constants(len(route.kept), route.top_k, route.weighting)
    signature = {**_PARAMETERS, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=router_kernel, signature=signature, constexprs=constants)
    major, minor = compute_capability
    compiled = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32))
    entry = compiled.metadata.name
    return RouterKernel(
        entry=entry,
        ptx=without_scratch(compiled.asm["ptx"], entry, len(_PARAMETERS)),
        top_k=route.top_k,
        rows_per_block=_ROWS_PER_PROGRAM,
        threads=32 * compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
    )


def without_scratch(ptx: str, entry: str, count: int) -> str:
    """Return ``ptx`` with the first ``count`` parameters of ``entry``.

    Triton adds pointers to memory of its own, used or not, which TensorRT would not pass.

    Raises:
        CheckFailedError: one of them is used.
    """
    begin, given, rest = re.split(rf"(?<=\.entry {entry}\()([^)]*)(?=\))", ptx)
    parameters = given.split(",")
    for parameter in parameters[count:]:
        if re.search(rf"\b{parameter.split()[-1]}\b", rest):
            raise CheckFailedError(
                "this Triton gives the router's kernel memory of its own, which TensorRT does not "
                "pass; use TensorRT's own layers"
            )
    return f"{begin}{','.join(parameters[:count])}\n{rest}"


def _constants(experts: int, top_k: int, weighting: Weighting) -> dict[str, Any]:
    return {
        "E": experts,
        "K": top_k,
        "EPSILON": RENORMALISER,
        "WEIGHTED": weighting != "one",
        "RENORMALISED": weighting == "renormalised",
        "BLOCK_R": _ROWS_PER_PROGRAM,
        "BLOCK_E": triton.next_power_of_2(experts),
    }

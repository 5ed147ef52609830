"""Steps of a plan over segments that run elsewhere, and answer later: other models, other machines.

Shapes: R rows (images or tokens).
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, RunStep, Segment
from advmoe_deploy.runtime.dispatch import combined, dispatch
from advmoe_deploy.runtime.routing import Tensors, route

# From a segment and its inputs by name to its outputs by name.
Ask = Callable[[Segment, Tensors], Awaitable[Tensors]]


async def walk(plan: Plan, images: NDArray[np.float32], ask: Ask) -> Tensors:
    """Return the tensors that the steps make of float32 ``images`` [N, C, H, W], by name.

    The experts of a layer are asked side by side, each for its own rows; who has none is not asked.

    Raises:
        Exception: whatever ``ask`` raises.
    """
    tensors: Tensors = {plan.inputs[0]: images}
    for step in plan.steps:
        match step:
            case RunStep():
                segment = plan.segment(step.segment)
                ends = {tensor.name: tensors[tensor.name] for tensor in segment.inputs}
                tensors |= await ask(segment, ends)
            case RouteStep():
                tensors |= route(step, tensors[step.scores])
            case ExpertsStep():
                tensors[step.output] = await _experts(plan, step, tensors, ask)
    return tensors


async def _experts(plan: Plan, step: ExpertsStep, tensors: Tensors, ask: Ask) -> NDArray[Any]:
    """Return the weighted answers in the rows' order."""
    x, decided = tensors[step.input], plan.route(step.layer)
    given = dispatch(tensors[decided.expert_ids])
    segments = dict(zip(decided.kept, step.segments, strict=True))
    chosen = [(plan.segment(segments[e]), x[rows]) for e, rows in given.rows()]
    asked = [ask(segment, {segment.inputs[0].name: rows}) for segment, rows in chosen]
    answers = [
        answer[segment.outputs[0].name]
        for (segment, _), answer in zip(chosen, await asyncio.gather(*asked), strict=True)
    ]
    parts = dict(zip(given.choices, answers, strict=True))
    return combined(decided, given, parts, tensors[decided.weights])

"""Pass that takes experts without rows out of the plan, and their scores out of the gates.

Contract: the segments of the dropped experts are gone, and so are their columns of the scores, what
is left being in its order. Where the scores come from a ``Gemm`` of constants and nobody else reads
either, its weights lose what made those columns; behind any other gate they are selected. The plan
says of each layer whose the scores are, so that ids keep the model's numbering. The scores that are
left change by rounding only. The model has to send nobody to these experts itself: rows whose best
score was theirs go elsewhere now.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper
from onnx import numpy_helper as onnx_numpy

from advmoe_deploy.export.graph.writer import (
    attributes_of,
    constants_of,
    consumers_of,
    replace_constants,
)
from advmoe_deploy.export.partition.cut import Partition
from advmoe_deploy.export.partition.sample import Arrays, Sample
from advmoe_deploy.export.passes.report import PassReport
from advmoe_deploy.models.routing.routing import RoutingRule
from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, Segment, Step

# The experts that are kept, by layer or by the name of the layer's scores.
Kept = Mapping[str, tuple[int, ...]]


def drop_experts(parts: Partition, rules: Sequence[RoutingRule]) -> tuple[Partition, PassReport]:
    """Rewrite gates in place; return what is left once ``rules`` have dropped their experts."""
    kept = {rule.layer: rule.kept for rule in rules if rule.dropped}
    columns = {parts.plan.route(layer).scores: experts for layer, experts in kept.items()}
    plan = _smaller_plan(parts.plan, kept, columns)
    graphs = {segment.name: parts.graphs[segment.name] for segment in plan.segments}
    for segment in plan.segments:
        for tensor in segment.outputs:
            if tensor.name in columns:
                _cut(graphs[segment.name], tensor.name, columns[tensor.name])

    def samples(images: NDArray[Any]) -> dict[str, Sample]:
        before = parts.samples(images)
        return {name: _smaller_sample(before[name], columns) for name in graphs}

    return Partition(plan, graphs, samples), PassReport("drop_experts", len(kept))


def _smaller_plan(plan: Plan, kept: Kept, columns: Kept) -> Plan:
    gone = {
        name
        for step in plan.steps
        if isinstance(step, ExpertsStep) and step.layer in kept
        for expert, name in enumerate(step.segments)
        if expert not in kept[step.layer]
    }
    return Plan(
        segments=tuple(_with_columns(s, columns) for s in plan.segments if s.name not in gone),
        steps=tuple(_without(step, kept) for step in plan.steps),
        inputs=plan.inputs,
        outputs=plan.outputs,
    )


def _without(step: Step, kept: Kept) -> Step:
    match step:
        case RouteStep() if step.layer in kept:
            return step.model_copy(update={"experts": kept[step.layer]})
        case ExpertsStep() if step.layer in kept:
            segments = tuple(step.segments[expert] for expert in kept[step.layer])
            return step.model_copy(update={"segments": segments})
    return step


def _with_columns(segment: Segment, columns: Kept) -> Segment:
    """Return the declaration of ``segment`` with the columns of its scores that are kept."""
    outputs = tuple(
        tensor.model_copy(update={"shape": (tensor.shape[0], len(columns[tensor.name]))})
        if tensor.name in columns
        else tensor
        for tensor in segment.outputs
    )
    return segment.model_copy(update={"outputs": outputs})


def _cut(model: ModelProto, scores: str, experts: tuple[int, ...]) -> None:
    """Leave of ``scores``, an output of ``model``, the columns ``experts``."""
    if names := _own_parameters(model, scores):
        constants = constants_of(model)
        replace_constants(model, {name: constants[name][list(experts)] for name in names})
    else:
        _select(model, scores, experts)
    (output,) = (output for output in model.graph.output if output.name == scores)
    output.type.tensor_type.shape.dim[1].dim_value = len(experts)


def _own_parameters(model: ModelProto, scores: str) -> list[str]:
    """Return the parameters, a row per expert, of a linear layer that makes nothing but scores."""
    constants, readers = constants_of(model), consumers_of(model)
    (maker,) = (node for node in model.graph.node if scores in node.output)
    names = list(maker.input[1:])
    plain = maker.op_type == "Gemm" and attributes_of(maker) == {"transB": 1}
    alone = scores not in readers and all(
        name in constants and len(readers[name]) == 1 for name in names
    )
    return names if plain and alone else []


def _select(model: ModelProto, scores: str, experts: tuple[int, ...]) -> None:
    everyone, columns = f"{scores}.all", f"{scores}.columns"
    for node in model.graph.node:
        node.input[:] = [everyone if name == scores else name for name in node.input]
        node.output[:] = [everyone if name == scores else name for name in node.output]
    constant = onnx_numpy.from_array(np.array(experts, np.int64), columns)
    model.graph.initializer.append(constant)
    model.graph.node.append(
        helper.make_node("Gather", [everyone, columns], [scores], f"{scores}.kept", axis=1)
    )


def _smaller_sample(sample: Sample, columns: Kept) -> Sample:
    def cut(arrays: Arrays) -> Arrays:
        return {
            name: values[:, list(columns[name])] if name in columns else values
            for name, values in arrays.items()
        }

    return replace(
        sample,
        outputs=cut(sample.outputs),
        exact=cut(sample.exact),
        disturbed=cut(sample.disturbed),
    )

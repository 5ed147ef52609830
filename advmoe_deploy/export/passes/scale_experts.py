"""Pass that moves a BatchNormalization's scale behind a weighted sum of experts into them.

Contract: where all experts of a layer end in a convolution and a normalisation with constant
parameters alone reads their combination, every expert's convolution takes over the scale, and an
addition of the shift remains. The shift cannot go with it: renormalised weights do not sum to 1.
The combination itself is then a scaled one, and so are the samples that segments are checked on;
logits change by rounding only. Every other layer stays as it is, with a reason.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from advmoe_deploy.export.graph.writer import (
    constants_of,
    consumers_of,
    replace_constants,
    scale_and_shift,
)
from advmoe_deploy.export.partition.cut import Partition
from advmoe_deploy.export.partition.sample import Arrays, Sample
from advmoe_deploy.export.passes.report import PassReport
from advmoe_deploy.plan import ExpertsStep, Plan

Factors = Mapping[str, NDArray[np.float64]]
_NAME = "scale_experts"


def scale_experts(parts: Partition) -> tuple[Partition, PassReport]:
    """Rewrite graphs in place; return the partition with its samples scaled, and the report."""
    factors: dict[str, NDArray[np.float64]] = {}
    declined = []
    for step in parts.plan.steps:
        if not isinstance(step, ExpertsStep):
            continue
        found = _norm_behind(parts, step)
        if found is None:
            continue
        trunk, norm = found
        if reason := _why_not(parts, step, trunk, norm):
            declined.append(f"{step.layer}: {reason}")
            continue
        factors[step.output], shift_C = scale_and_shift(norm, constants_of(trunk))
        _replace_norm(trunk, norm, shift_C)
        for name in step.segments:
            _scale_expert(parts.graphs[name], factors[step.output])
    report = PassReport(_NAME, len(factors), tuple(declined))

    def samples(images: NDArray[np.float32]) -> dict[str, Sample]:
        return scaled_samples(parts.plan, parts.samples(images), factors)

    return replace(parts, samples=samples), report


def scaled_samples(
    plan: Plan, samples: Mapping[str, Sample], factors: Factors
) -> dict[str, Sample]:
    """Return ``samples`` with every tensor in ``factors`` scaled, as inputs and as outputs."""
    made = {
        name: factors[step.output]
        for step in plan.steps
        if isinstance(step, ExpertsStep) and step.output in factors
        for name in step.segments
    }

    def scaled(arrays: Arrays, by: Factors) -> Arrays:
        return {
            name: (values * by[name][:, None, None]).astype(values.dtype) if name in by else values
            for name, values in arrays.items()
        }

    return {
        name: Sample(
            scaled(sample.inputs, factors),
            *(
                scaled(arrays, dict.fromkeys(arrays, made[name]) if name in made else {})
                for arrays in (sample.outputs, sample.exact, sample.disturbed)
            ),
        )
        for name, sample in samples.items()
    }


def _readers(parts: Partition, tensor: str) -> list[tuple[ModelProto, NodeProto]]:
    """Return the nodes of the trunk that read ``tensor``, each with its graph."""
    steps = [step for step in parts.plan.steps if isinstance(step, ExpertsStep)]
    inside = {name for step in steps for name in step.segments}
    trunk = [graph for name, graph in parts.graphs.items() if name not in inside]
    return [(graph, node) for graph in trunk for node in consumers_of(graph).get(tensor, [])]


def _norm_behind(parts: Partition, step: ExpertsStep) -> tuple[ModelProto, NodeProto] | None:
    norms = [
        (graph, node)
        for graph, node in _readers(parts, step.output)
        if node.op_type == "BatchNormalization"
    ]
    return norms[0] if norms else None


def _why_not(parts: Partition, step: ExpertsStep, trunk: ModelProto, norm: NodeProto) -> str | None:
    given = {other.input for other in parts.plan.steps if isinstance(other, ExpertsStep)}
    shared = len(_readers(parts, step.output)) > 1
    if shared or step.output in given or step.output in parts.plan.outputs:
        return "something else than the normalisation reads the combination too"
    if any(name not in constants_of(trunk) for name in norm.input[1:]):
        return "the normalisation's parameters are not constants"
    for name in step.segments:
        graph = parts.graphs[name]
        last = graph.graph.node[-1]
        constants = constants_of(graph)
        if last.op_type != "Conv" or list(last.output) != [graph.graph.output[0].name]:
            return "an expert does not end in a convolution"
        if any(constant not in constants for constant in last.input[1:]):
            return "an expert's weights are not constants"
        if any(len(consumers_of(graph)[constant]) > 1 for constant in last.input[1:]):
            return "another node shares the weights of an expert's last convolution"
    return None


def _scale_expert(model: ModelProto, factor_C: NDArray[np.float64]) -> None:
    last, constants = model.graph.node[-1], constants_of(model)
    weight, *bias = last.input[1:]
    changed = {weight: (constants[weight] * factor_C[:, None, None, None]).astype(np.float32)}
    changed |= {name: (constants[name] * factor_C).astype(np.float32) for name in bias}
    replace_constants(model, changed)


def _replace_norm(model: ModelProto, norm: NodeProto, shift_C: NDArray[np.float64]) -> None:
    shift = f"{norm.name}.shift"
    addition = helper.make_node("Add", [norm.input[0], shift], list(norm.output), norm.name)
    position = list(model.graph.node).index(norm)
    model.graph.node.remove(norm)
    model.graph.node.insert(position, addition)
    replace_constants(model, {shift: shift_C[:, None, None].astype(np.float32)})

"""One ONNX graph from a plan: every expert runs on its own rows only.

Standard operators, so any runtime executes it. In the form ``"if"`` every expert sits in an ``If``
and is not run at all without rows. Its weights are initializers of its branch: as initializers of
the main graph they would cost up to 1.7 times the run time. In the form ``"gather"``, for runtimes
that do not take an ``If`` whose branches differ in shape, an expert without rows runs on none.

Shapes: N images, R rows (images or tokens), E experts, K experts per row, S = R * K choices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx import numpy_helper as onnx_numpy

from advmoe_deploy.export.onnx_graph import GraphWriter, value_info
from advmoe_deploy.plan import (
    RENORMALISER,
    ExpertsStep,
    Plan,
    RouteStep,
    RunStep,
    Step,
    TensorInfo,
)

Form = Literal["if", "gather"]


@dataclass
class Inlined:
    """Nodes and constants of a segment, renamed so that they can join another graph."""

    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)


def graph_from_plan(
    plan: Plan, segments: Mapping[str, ModelProto], form: Form = "if"
) -> ModelProto:
    """Return the whole plan as one graph; ``segments`` holds the graph of each segment."""
    writer = GraphWriter()
    for step in plan.steps:
        write_step(writer, plan, step, segments, form)
    return writer.model("model", *plan_ends(plan))


def write_step(
    writer: GraphWriter, plan: Plan, step: Step, segments: Mapping[str, ModelProto], form: Form
) -> None:
    """Add one step of ``plan``."""
    match step:
        case RunStep():
            write_segment(writer, segments[step.segment])
        case RouteStep():
            write_route(writer, step)
        case ExpertsStep():
            _write_experts(writer, plan, step, segments, form)


def plan_ends(plan: Plan) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Return the declarations of the plan's inputs and outputs, in order."""
    tensors = plan.tensors()
    return [tensors[name] for name in plan.inputs], [tensors[name] for name in plan.outputs]


def inline(model: ModelProto, prefix: str, kept: Mapping[str, str]) -> Inlined:
    """Return the graph of ``model`` with ``prefix/`` before every name but those in ``kept``.

    ``kept`` maps inputs and outputs to what they are called in the graph to be joined.
    """

    def renamed(name: str) -> str:
        return kept.get(name, f"{prefix}/{name}") if name else name

    result = Inlined()
    for tensor in model.graph.initializer:
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copy.name = renamed(tensor.name)
        result.initializers.append(copy)
    for node in model.graph.node:
        clone = NodeProto()
        clone.CopyFrom(node)
        clone.name = f"{prefix}/{node.name}"
        clone.input[:] = [renamed(name) for name in node.input]
        clone.output[:] = [renamed(name) for name in node.output]
        result.nodes.append(clone)
    return result


def write_segment(
    writer: GraphWriter, model: ModelProto, kept: Mapping[str, str] | None = None
) -> None:
    """Add a segment; its inputs and outputs keep their names, or get those of ``kept``."""
    own = {tensor.name: tensor.name for tensor in [*model.graph.input, *model.graph.output]}
    part = inline(model, model.graph.name, own if kept is None else kept)
    writer.nodes += part.nodes
    writer.initializers |= {tensor.name: tensor for tensor in part.initializers}


def write_route(writer: GraphWriter, step: RouteStep) -> None:
    """Add the choice of the best scores, ties to the lowest index, and its weights."""
    ids, weights = rows_of(step)
    if step.top_k == 1:
        writer.emit("ArgMax", [step.scores], ids, axis=1, keepdims=1, select_last_index=0)
    else:
        k = writer.integers(f"{step.layer}/k", step.top_k)
        best = f"{step.layer}/best"
        writer.nodes.append(
            helper.make_node("TopK", [step.scores, k], [best, ids], ids, axis=1, sorted=1)
        )
    _write_weights(writer, step, ids, weights)
    if step.tokens is not None:
        shape = writer.integers(f"{step.layer}/shape", -1, step.tokens, step.top_k)
        writer.emit("Reshape", [ids, shape], step.expert_ids)
        writer.emit("Reshape", [weights, shape], step.weights)


def rows_of(step: RouteStep) -> tuple[str, str]:
    """Return the names of ids and weights as [R, K], whatever the outputs' shape."""
    if step.tokens is None:
        return step.expert_ids, step.weights
    return f"{step.layer}/ids", f"{step.layer}/weights"


def _write_weights(writer: GraphWriter, step: RouteStep, ids: str, weights: str) -> None:
    layer = step.layer
    if step.weighting == "one":
        shape = writer.emit("Shape", [ids], f"{layer}/ids_shape")
        one = onnx_numpy.from_array(np.ones(1, np.float32))
        writer.emit("ConstantOfShape", [shape], weights, value=one)
        return
    shares = writer.emit("Softmax", [step.scores], f"{layer}/probabilities", axis=1)
    if step.weighting == "probability":
        writer.emit("GatherElements", [shares, ids], weights, axis=1)
        return
    chosen = writer.emit("GatherElements", [shares, ids], f"{layer}/chosen", axis=1)
    axis = writer.integers("axis_1", 1)
    total = writer.emit("ReduceSum", [chosen, axis], f"{layer}/total", keepdims=1)
    little = writer.constant("renormaliser", np.array(RENORMALISER, np.float32))
    divisor = writer.emit("Add", [total, little], f"{layer}/divisor")
    writer.emit("Div", [chosen, divisor], weights)


def _write_experts(
    writer: GraphWriter,
    plan: Plan,
    step: ExpertsStep,
    segments: Mapping[str, ModelProto],
    form: Form,
) -> None:
    layer, route = step.layer, plan.route(step.layer)
    ids, weights = rows_of(route)
    flat = writer.integers("flat", -1)
    ids_S = writer.emit("Reshape", [ids, flat], f"{layer}/choices")
    choices, parts = [], []
    for expert, name in enumerate(step.segments):
        choices.append(_write_choices(writer, ids_S, name, expert, route.top_k))
        if form == "if":
            parts.append(_write_branch(writer, plan, step, name, segments[name]))
        else:
            parts.append(_write_expert(writer, plan, step, name, segments[name]))
    # The choices are a permutation, so every row of the scattered tensor is overwritten.
    axis = writer.integers("axis_1", 1)
    order_S = writer.emit("Concat", choices, f"{layer}/order", axis=0)
    indices = writer.emit("Unsqueeze", [order_S, axis], f"{layer}/indices")
    grouped = writer.emit("Concat", parts, f"{layer}/grouped", axis=0)
    if route.weighting == "one":
        writer.emit("ScatterND", [grouped, indices, grouped], step.output)
        return
    each = writer.emit("ScatterND", [grouped, indices, grouped], f"{layer}/each")
    _write_sum(writer, plan, step, each, weights)


def _write_sum(writer: GraphWriter, plan: Plan, step: ExpertsStep, each: str, weights: str) -> None:
    """Add the weighted sum over the K answers [S, ...] of each row."""
    layer, top_k = step.layer, plan.route(step.layer).top_k
    rest = [int(size) for size in plan.tensors()[step.output].shape[1:]]
    beside = writer.integers(f"{layer}/beside", -1, top_k, *([1] * len(rest)))
    weights_RK = writer.emit("Reshape", [weights, beside], f"{layer}/weights_beside")
    shape = writer.integers(f"{layer}/by_row", -1, top_k, *rest)
    each_RK = writer.emit("Reshape", [each, shape], f"{layer}/each_by_row")
    weighted = writer.emit("Mul", [each_RK, weights_RK], f"{layer}/weighted")
    axis = writer.integers("axis_1", 1)
    writer.emit("ReduceSum", [weighted, axis], step.output, keepdims=0)


def _write_choices(writer: GraphWriter, ids_S: str, name: str, expert: int, top_k: int) -> str:
    """Add which choices are of one expert, and from which rows; return the choices' name."""
    number = writer.constant(f"{name}/number", np.array(expert, np.int64))
    axis = writer.integers("axis_0", 0)
    mine_S = writer.emit("Equal", [ids_S, number], f"{name}/mine")
    found = writer.emit("NonZero", [mine_S], f"{name}/found")
    if top_k == 1:
        choices = writer.emit("Squeeze", [found, axis], f"{name}/rows")
    else:
        choices = writer.emit("Squeeze", [found, axis], f"{name}/choices")
        per_row = writer.constant(f"per_row_{top_k}", np.array(top_k, np.int64))
        writer.emit("Div", [choices, per_row], f"{name}/rows")
    return choices


def _write_expert(
    writer: GraphWriter, plan: Plan, step: ExpertsStep, name: str, model: ModelProto
) -> str:
    """Add an expert that runs whether it has rows or not."""
    (image,), (output,) = plan.segment(name).inputs, plan.segment(name).outputs
    gathered = writer.emit("Gather", [step.input, f"{name}/rows"], f"{name}/input", axis=0)
    result = f"{name}/{output.name}"
    write_segment(writer, model, {image.name: gathered, output.name: result})
    return result


def _write_branch(
    writer: GraphWriter, plan: Plan, step: ExpertsStep, name: str, model: ModelProto
) -> str:
    """Add an ``If`` that runs an expert where it has rows."""
    (image,), (output,) = plan.segment(name).inputs, plan.segment(name).outputs
    gathered, result = f"{name}/input", f"{name}/then"
    none = writer.constant("none", np.array(0, np.int64))
    count = writer.emit("Size", [f"{name}/rows"], f"{name}/count")
    writer.emit("Greater", [count, none], f"{name}/any")
    part = inline(model, name, {image.name: gathered, output.name: result})
    gather = helper.make_node("Gather", [step.input, f"{name}/rows"], [gathered], gathered, axis=0)
    answer = output.model_copy(update={"shape": (f"rows of {name}", *output.shape[1:])})
    then_branch = helper.make_graph(
        [gather, *part.nodes], f"{name}/then_branch", [], [_info(answer, result)], part.initializers
    )
    return writer.emit(
        "If",
        [f"{name}/any"],
        f"{name}/{output.name}",
        then_branch=then_branch,
        else_branch=_empty_branch(name, answer),
    )


def _empty_branch(name: str, answer: TensorInfo) -> GraphProto:
    empty = f"{name}/else"
    values = np.empty((0, *(int(size) for size in answer.shape[1:])), np.float32)
    node = helper.make_node("Constant", [], [empty], empty, value=onnx_numpy.from_array(values))
    return helper.make_graph([node], f"{name}/else_branch", [], [_info(answer, empty)])


def _info(tensor: TensorInfo, name: str) -> ValueInfoProto:
    return value_info(tensor.model_copy(update={"name": name}))

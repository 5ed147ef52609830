"""One ONNX graph from a plan: every expert sits in an ``If`` and runs on its own rows only.

Standard operators, so any runtime executes it. An expert's weights are initializers of its branch:
as initializers of the main graph they would cost up to 1.7 times the run time. An expert without
rows is not run at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx import numpy_helper as onnx_numpy

from advmoe_deploy.export.onnx_graph import GraphWriter, value_info
from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, RunStep, TensorInfo


@dataclass
class Inlined:
    """Nodes and constants of a segment, renamed so that they can join another graph."""

    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)


def graph_from_plan(plan: Plan, segments: Mapping[str, ModelProto]) -> ModelProto:
    """Return the whole plan as one graph; ``segments`` holds the graph of each segment."""
    writer = GraphWriter()
    for step in plan.steps:
        match step:
            case RunStep():
                _write_segment(writer, segments[step.segment], step.segment)
            case RouteStep():
                write_route(writer, step)
            case ExpertsStep():
                _write_experts(writer, plan, step, segments)
    return writer.model("model", [_tensor(plan, plan.inputs[0])], plan_outputs(plan))


def plan_outputs(plan: Plan) -> list[TensorInfo]:
    """Return the declarations of the plan's outputs, in order."""
    return [_tensor(plan, name) for name in plan.outputs]


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


def write_route(writer: GraphWriter, step: RouteStep) -> None:
    """Add the choice of the best score; ties go to the lowest index, the weight is 1."""
    assert step.top_k == 1, "top-1 is the only route so far"
    ids = writer.emit(
        "ArgMax", [step.scores], step.expert_ids, axis=1, keepdims=1, select_last_index=0
    )
    shape = writer.emit("Shape", [ids], f"{step.layer}/shape")
    one = onnx_numpy.from_array(np.ones(1, np.float32))
    writer.emit("ConstantOfShape", [shape], step.weights, value=one)


def _write_segment(writer: GraphWriter, model: ModelProto, name: str) -> None:
    own = [*model.graph.input, *model.graph.output]
    part = inline(model, name, {tensor.name: tensor.name for tensor in own})
    writer.nodes += part.nodes
    writer.initializers |= {tensor.name: tensor for tensor in part.initializers}


def _write_experts(
    writer: GraphWriter, plan: Plan, step: ExpertsStep, segments: Mapping[str, ModelProto]
) -> None:
    layer = step.layer
    axis = writer.integers(f"{layer}/axis_1", 1)
    ids_N = writer.emit("Squeeze", [f"{layer}.expert_ids", axis], f"{layer}/ids")
    rows, parts = [], []
    for expert, name in enumerate(step.segments):
        rows.append(_write_rows(writer, ids_N, name, expert))
        parts.append(_write_branch(writer, plan, step, name, segments[name]))
    # Rows are a permutation, so every row of the scattered tensor is overwritten.
    order_N = writer.emit("Concat", rows, f"{layer}/order", axis=0)
    indices = writer.emit("Unsqueeze", [order_N, axis], f"{layer}/indices")
    grouped = writer.emit("Concat", parts, f"{layer}/grouped", axis=0)
    writer.emit("ScatterND", [grouped, indices, grouped], step.output)


def _write_rows(writer: GraphWriter, ids_N: str, name: str, expert: int) -> str:
    """Add the row numbers of one expert, and whether there are any."""
    number = writer.constant(f"{name}/number", np.array(expert, np.int64))
    none = writer.constant("none", np.array(0, np.int64))
    axis = writer.integers("axis_0", 0)
    mine_N = writer.emit("Equal", [ids_N, number], f"{name}/mine")
    found = writer.emit("NonZero", [mine_N], f"{name}/found")
    rows = writer.emit("Squeeze", [found, axis], f"{name}/rows")
    count = writer.emit("Size", [rows], f"{name}/count")
    writer.emit("Greater", [count, none], f"{name}/any")
    return rows


def _write_branch(
    writer: GraphWriter, plan: Plan, step: ExpertsStep, name: str, model: ModelProto
) -> str:
    (image,), (output,) = plan.segment(name).inputs, plan.segment(name).outputs
    gathered, result = f"{name}/input", f"{name}/then"
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


def _tensor(plan: Plan, name: str) -> TensorInfo:
    """Return the declaration of a tensor of ``plan``, wherever it is made."""
    for route in plan.routes:
        if name == route.expert_ids:
            return TensorInfo(name=name, dtype="int64", shape=("N", route.top_k))
        if name == route.weights:
            return TensorInfo(name=name, dtype="float32", shape=("N", route.top_k))
    tensors = (t for s in plan.segments for t in (*s.inputs, *s.outputs))
    return next(t for t in tensors if t.name == name)

"""Stitching of a plan into one ONNX graph, in which every expert runs on its own rows only.

Routing, dispatch and combination are one custom operator each, whose bodies of standard operators
are attached, so any runtime executes the graph. In the form ``"if"`` every expert sits in an ``If``
and is not run at all without rows. Its weights are initializers of its branch: as initializers of
the main graph they would cost up to 1.7 times the run time. The form ``"grouped"`` is the same, but
that experts of linear layers are one node per layer, see
:mod:`~advmoe_deploy.export.graph.grouped`. In the form ``"gather"``, for runtimes that do not take
an ``If`` whose branches differ in shape, an
expert without rows runs on none, and the bodies stand in the place of the custom operators.

Shapes: N images, R rows (images or tokens), E experts, K experts per row, S = R * K choices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx import numpy_helper as onnx_numpy

from advmoe_deploy.export.graph.grouped import are_groupable, write_grouped
from advmoe_deploy.export.graph.op_bodies import with_bodies, without_custom_ops
from advmoe_deploy.export.graph.writer import GraphWriter, value_info
from advmoe_deploy.plan import (
    RENORMALISER,
    ExpertsStep,
    Plan,
    RouteStep,
    RunStep,
    Step,
    TensorInfo,
)

Form = Literal["grouped", "if", "gather"]


@dataclass
class Inlined:
    """Nodes and constants of a segment, renamed so that they can join another graph."""

    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)


def graph_from_plan(
    plan: Plan, segments: Mapping[str, ModelProto], form: Form = "grouped"
) -> ModelProto:
    """Return the whole plan as one graph; ``segments`` holds the graph of each segment."""
    writer = GraphWriter()
    for step in plan.steps:
        write_step(writer, plan, step, segments, form)
    model = writer.model("model", *plan_ends(plan))
    # Where a custom operator hides shapes, the plan tells them: runtimes fuse less without.
    made = {name for node in model.graph.node for name in node.output}
    ends = {*plan.inputs, *plan.outputs}
    inner = [t for name, t in plan.tensors().items() if name in made - ends]
    model.graph.value_info.extend(value_info(tensor) for tensor in inner)
    return without_custom_ops(model) if form == "gather" else with_bodies(model)


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
            _Experts(writer, plan, step, segments, form).write()


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
    operator, attributes = router_operator(step)
    writer.emit_custom(operator, [step.scores], [choices_of(step), weights], **attributes)
    write_ids(writer, step)
    if step.tokens is not None:
        shape = writer.integers(f"{step.layer}/shape", -1, step.tokens, step.top_k)
        writer.emit("Reshape", [ids, shape], step.expert_ids)
        writer.emit("Reshape", [weights, shape], step.weights)


def write_ids(writer: GraphWriter, step: RouteStep) -> None:
    """Add the ids, in the model's numbering, of the choices among the experts that are kept."""
    if step.experts is not None:
        experts = writer.integers(f"{step.layer}/kept", *step.experts)
        writer.emit("Gather", [experts, choices_of(step)], rows_of(step)[0], axis=0)


def router_operator(step: RouteStep) -> tuple[str, dict[str, int | float]]:
    """Return the custom operator that follows the rule of ``step``, and its attributes."""
    match step.weighting:
        case "one":
            return "RouterTop1", {}
        case "probability":
            return "RouterTopKProbability", {"k": step.top_k}
        case "renormalised":
            return "RouterTopKRenormalised", {"k": step.top_k, "epsilon": RENORMALISER}


def rows_of(step: RouteStep) -> tuple[str, str]:
    """Return the names of ids and weights as [R, K], whatever the outputs' shape."""
    if step.tokens is None:
        return step.expert_ids, step.weights
    return f"{step.layer}/ids", f"{step.layer}/weights"


def choices_of(step: RouteStep) -> str:
    """Return the name of the choices among the experts that are kept, [R, K]: ids, if all are."""
    return rows_of(step)[0] if step.experts is None else f"{step.layer}/choices"


class _Experts:
    """Writes one layer of experts: dispatch, every expert on its rows, and their combination."""

    def __init__(
        self,
        writer: GraphWriter,
        plan: Plan,
        step: ExpertsStep,
        segments: Mapping[str, ModelProto],
        form: Form,
    ) -> None:
        self.writer, self.plan, self.step, self.segments = writer, plan, step, segments
        self.form, self.route = form, plan.route(step.layer)
        (self.answer,) = plan.segment(step.segments[0]).outputs

    def write(self) -> None:
        """Write the layer."""
        layer, (ids, weights) = self.step.layer, rows_of(self.route)
        count = self.route.num_experts
        made = [f"{layer}/{name}" for name in ("rows", "positions", "offsets", "busy")]
        self.writer.emit_custom("ExpertDispatch", [ids], made, num_experts=count)
        self.rows, positions, offsets, busy = made
        grouped = self._write_grouped(offsets) or self._write_each(offsets, busy)
        if self.route.weighting == "one":
            self.writer.emit_custom("ExpertCombine", [grouped, positions], [self.step.output])
        else:
            given = [grouped, positions, weights]
            self.writer.emit_custom("ExpertWeightedCombine", given, [self.step.output])

    def _write_grouped(self, offsets: str) -> str | None:
        """Add the experts in one, if they can be; return the name of their answers."""
        graphs = [self.segments[name] for name in self.step.segments]
        if self.form != "grouped" or not are_groupable(graphs):
            return None
        layer, count = self.step.layer, self.route.num_experts
        rows = self.writer.emit("Gather", [self.step.input, self.rows], f"{layer}/input", axis=0)
        if len(graphs) < count:  # experts that are left out have no rows
            ends = self.writer.integers(f"{layer}/ends", *self.route.kept, count)
            offsets = self.writer.emit("Gather", [offsets, ends], f"{layer}/bounds", axis=0)
        return write_grouped(self.writer, layer, graphs, rows, offsets)

    def _write_each(self, offsets: str, busy: str) -> str:
        """Add the experts one by one; return the name of their answers."""
        count = self.route.num_experts
        self.bounds = self._split(offsets, count + 1)
        self.busy = [] if self.form == "gather" else self._split(busy, count)
        experts = zip(self.route.kept, self.step.segments, strict=True)
        parts = [self._part(expert, name) for expert, name in experts]
        return self.writer.emit("Concat", parts, f"{self.step.layer}/grouped", axis=0)

    def _split(self, name: str, count: int) -> list[str]:
        parts = [f"{name}-{index}" for index in range(count)]
        self.writer.nodes.append(helper.make_node("Split", [name], parts, parts[0], axis=0))
        return parts

    def _part(self, expert: int, name: str) -> str:
        """Add one expert; return the name of its answers."""
        result = f"{name}/{self.answer.name}"
        if self.form != "gather":
            return self._write_branch(expert, name, result)
        input_ = self._write_rows(self.writer, expert, name)
        (given,) = self.plan.segment(name).inputs
        kept = {given.name: input_, self.answer.name: result}
        write_segment(self.writer, self.segments[name], kept)
        return result

    def _write_rows(self, writer: GraphWriter, expert: int, name: str) -> str:
        """Add the gathering of an expert's rows; return their name."""
        bounds = self.bounds[expert : expert + 2]
        rows = writer.emit("Slice", [self.rows, *bounds], f"{name}/rows")
        return writer.emit("Gather", [self.step.input, rows], f"{name}/input", axis=0)

    def _write_branch(self, expert: int, name: str, result: str) -> str:
        """Add an ``If`` that runs an expert where it has rows."""
        writer = GraphWriter()
        given, made = self._write_rows(writer, expert, name), f"{name}/then"
        (input_,) = self.plan.segment(name).inputs
        part = inline(self.segments[name], name, {input_.name: given, self.answer.name: made})
        of_rows, answer = _of_rows(input_, name), _of_rows(self.answer, name)
        then_branch = helper.make_graph(
            [*writer.nodes, *part.nodes],
            f"{name}/then_branch",
            [],
            [_info(answer, made)],
            part.initializers,
            # A kernel hides how many dimensions rows have, and what has no known shape is not
            # fused: without this, residual additions stay outside of the convolutions.
            value_info=[_info(of_rows, given)],
        )
        return self.writer.emit(
            "If",
            [self.busy[expert]],
            result,
            then_branch=then_branch,
            else_branch=_empty_branch(name, answer),
        )


def _of_rows(tensor: TensorInfo, name: str) -> TensorInfo:
    """Return ``tensor`` with as many rows as the expert called ``name`` has."""
    return tensor.model_copy(update={"shape": (f"rows of {name}", *tensor.shape[1:])})


def _empty_branch(name: str, answer: TensorInfo) -> GraphProto:
    empty = f"{name}/else"
    values = np.empty((0, *(int(size) for size in answer.shape[1:])), np.float32)
    node = helper.make_node("Constant", [], [empty], empty, value=onnx_numpy.from_array(values))
    return helper.make_graph([node], f"{name}/else_branch", [], [_info(answer, empty)])


def _info(tensor: TensorInfo, name: str) -> ValueInfoProto:
    return value_info(tensor.model_copy(update={"name": name}))

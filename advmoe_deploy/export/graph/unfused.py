"""Unfused baseline: every expert computed on every row, then selected.

Where the experts of a layer are the same network up to the weights of convolutions, as AdvMoE's
pathways are, each routed convolution becomes one with the channels of all experts, as the papers'
released layers compute it, BatchNorm folded per expert. It is given its best form: what the experts
share is computed once, an activation that only follows the convolution runs inside it, and the
selection copies whole experts, not elements. Any other layer runs its experts one by one on all
rows and adds up their outputs, each times its weight, which is 0 where it was not chosen.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from advmoe_deploy.export.graph.op_bodies import without_custom_ops
from advmoe_deploy.export.graph.stitch import (
    choices_of,
    plan_ends,
    rows_of,
    write_route,
    write_segment,
)
from advmoe_deploy.export.graph.writer import GraphWriter, attributes_of, constants_of, consumers_of
from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, RunStep


def unfused_graph(plan: Plan, segments: Mapping[str, ModelProto]) -> ModelProto:
    """Return the model of ``plan`` with every expert computed; same inputs, same outputs."""
    writer = GraphWriter()
    for step in plan.steps:
        match step:
            case RunStep():
                write_segment(writer, segments[step.segment])
            case RouteStep():
                write_route(writer, step)
            case ExpertsStep():
                route, experts = plan.route(step.layer), [segments[n] for n in step.segments]
                if why_not_merged(route, experts):
                    _write_weighted_sum(writer, plan, step, experts)
                else:
                    _Merge(writer, step, choices_of(route), experts).run()
    return without_custom_ops(writer.model("unfused", *plan_ends(plan)))


def why_not_merged(route: RouteStep, experts: Sequence[ModelProto]) -> str | None:
    """Return why the experts cannot share one graph of wide convolutions, ``None`` if they can."""
    if route.weighting != "one":
        return "outputs are weighted"
    constants = [constants_of(expert) for expert in experts]
    if len({len(expert.graph.node) for expert in experts}) > 1:
        return "experts have different numbers of nodes"
    for nodes in zip(*(expert.graph.node for expert in experts), strict=True):
        first = nodes[0]
        if any(node != first for node in nodes):
            return f"experts differ at {first.name}"
        for name in () if first.op_type == "Conv" else first.input:
            if name in constants[0] and not _all_equal([c.get(name) for c in constants]):
                return f"{name} of a {first.op_type} differs between experts"
    return None


def _all_equal(values: Sequence[NDArray[np.float32] | None]) -> bool:
    first, *others = values
    return all(o is not None and first is not None and np.array_equal(first, o) for o in others)


def _write_weighted_sum(
    writer: GraphWriter, plan: Plan, step: ExpertsStep, experts: Sequence[ModelProto]
) -> None:
    weights_RE = _write_weight_matrix(writer, plan.route(step.layer))
    rest = plan.tensors()[step.output].shape[1:]
    beside = writer.integers(f"{step.layer}/beside", -1, *([1] * len(rest)))
    axis = writer.integers("axis_1", 1)
    parts = []
    for expert, model in enumerate(experts):
        name, (given,), (answer,) = model.graph.name, model.graph.input, model.graph.output
        write_segment(writer, model, {given.name: step.input, answer.name: f"{name}/all"})
        bounds = [writer.integers(f"number_{i}", i) for i in (expert, expert + 1)]
        column = writer.emit("Slice", [weights_RE, *bounds, axis], f"{name}/column")
        weight = writer.emit("Reshape", [column, beside], f"{name}/share")
        parts.append(writer.emit("Mul", [f"{name}/all", weight], f"{name}/part"))
    writer.emit("Sum", parts, step.output)


def _write_weight_matrix(writer: GraphWriter, route: RouteStep) -> str:
    """Add the weight of every kept expert for every row, [R, E], 0 where it was not chosen."""
    layer, choices, (_, weights) = route.layer, choices_of(route), rows_of(route)
    experts = writer.constant(f"{layer}/experts", np.array(len(route.kept), np.int64))
    off_on = writer.constant("off_on", np.array([0, 1], np.float32))
    chosen = writer.emit("OneHot", [choices, experts, off_on], f"{layer}/one_hot", axis=-1)
    last = writer.integers("axis_2", 2)
    weights_RK1 = writer.emit("Unsqueeze", [weights, last], f"{layer}/weights_column")
    weighted = writer.emit("Mul", [chosen, weights_RK1], f"{layer}/by_choice")
    axis = writer.integers("axis_1", 1)
    return writer.emit("ReduceSum", [weighted, axis], f"{layer}/by_expert", keepdims=0)


class _Merge:
    """Walks experts of one structure side by side and writes what they have in common once."""

    def __init__(
        self, writer: GraphWriter, step: ExpertsStep, ids: str, experts: Sequence[ModelProto]
    ) -> None:
        self.writer, self.experts, self.ids, self.layer = writer, experts, ids, step.layer
        self.constants = [constants_of(model) for model in experts]
        self.readers = consumers_of(experts[0])
        inferred = onnx.shape_inference.infer_shapes(experts[0], strict_mode=True)
        self.shapes = {
            info.name: [d.dim_value for d in info.type.tensor_type.shape.dim]
            for info in (*inferred.graph.value_info, *inferred.graph.output)
        }
        (given,), (answer,) = experts[0].graph.input, experts[0].graph.output
        self.ends = {given.name: step.input, answer.name: step.output}
        self.inside_conv: set[str] = set()

    def run(self) -> None:
        """Write every node of the merged expert."""
        for node in self.experts[0].graph.node:
            if node.output[0] in self.inside_conv:
                continue
            if node.op_type == "Conv" and not self._is_shared(node.input[1]):
                self._write_bank(node)
            else:
                self._write_shared(node)

    def _named(self, name: str) -> str:
        return self.ends.get(name, f"{self.layer}/every/{name}")

    def _is_shared(self, name: str) -> bool:
        return _all_equal([constants[name] for constants in self.constants])

    def _write_shared(self, node: NodeProto) -> None:
        for name in set(node.input) & self.constants[0].keys():
            self.writer.constant(self._named(name), self.constants[0][name])
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = self._named(node.name)
        copy.input[:] = [self._named(name) for name in node.input]
        copy.output[:] = [self._named(name) for name in node.output]
        self.writer.nodes.append(copy)

    def _write_bank(self, conv: NodeProto) -> None:
        """Write one convolution of all experts, the activation it may swallow, and the choice."""
        banks = [self.writer.constant(self._named(n), self._bank(n)) for n in conv.input[1:]]
        name = self._named(conv.output[0])
        every = self.writer.emit(
            "Conv", [self._named(conv.input[0]), *banks], f"{name}.every", **attributes_of(conv)
        )
        readers = self.readers.get(conv.output[0], [])
        if len(readers) == 1 and readers[0].op_type == "Relu":
            every = self.writer.emit("Relu", [every], f"{name}.active")
            self.inside_conv.add(readers[0].output[0])
            self._write_choice(every, conv.output[0], self._named(readers[0].output[0]))
        else:
            self._write_choice(every, conv.output[0], name)

    def _bank(self, name: str) -> NDArray[np.float32]:
        return np.concatenate([constants[name] for constants in self.constants])

    def _write_choice(self, every: str, conv: str, chosen: str) -> None:
        _, channels, height, width = self.shapes[conv]
        name, experts = self._named(conv), len(self.experts)
        split = self.writer.integers(f"{name}.split", 0, experts, channels * height * width)
        shape = self.writer.integers(f"{name}.shape", 0, channels, height, width)
        by_expert = self.writer.emit("Reshape", [every, split], f"{name}.by_expert")
        rows = self.writer.emit("GatherND", [by_expert, self.ids], f"{name}.chosen", batch_dims=1)
        self.writer.emit("Reshape", [rows, shape], chosen)

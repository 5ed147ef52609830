"""Graphs for TensorRT: a plan whose segments route inside, in standard operators only.

No functions, no domain but ONNX's own, opset 17; nothing that TensorRT would have to fold first.
"""

from collections.abc import Callable, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, helper
from onnx import numpy_helper as onnx_numpy

from advmoe_deploy.export.graph.stitch import choices_of, rows_of, write_ids
from advmoe_deploy.export.graph.writer import GraphWriter
from advmoe_deploy.plan import RENORMALISER, ExpertsStep, Plan, RouteStep, RunStep, Segment


def tensorrt_plan(plan: Plan, folder: str, suffix: str) -> Plan:
    """Return ``plan`` with its routes inside of the segments that make their scores.

    Segments keep their names; their files are in ``folder`` and end with ``suffix``.
    """
    read = {*plan.outputs, *(t.name for segment in plan.segments for t in segment.inputs)}
    read |= {step.input for step in plan.steps if isinstance(step, ExpertsStep)}
    trunk = {step.segment for step in plan.steps if isinstance(step, RunStep)}

    def deciding(segment: Segment) -> Segment:
        outputs = list(segment.outputs)
        if segment.name in trunk:
            outputs = [tensor for tensor in outputs if tensor.name in read]
            outputs += [tensor for route in routes_in(plan, segment) for tensor in route.made]
        return segment.model_copy(update={"outputs": tuple(outputs)})

    routed = Plan(
        segments=tuple(deciding(segment) for segment in plan.segments),
        steps=tuple(step for step in plan.steps if not isinstance(step, RouteStep)),
        inside=plan.routes,
        inputs=plan.inputs,
        outputs=plan.outputs,
    )
    return plan_in(routed, folder, suffix)


def plan_in(plan: Plan, folder: str, suffix: str) -> Plan:
    """Return ``plan`` with its segments' files in ``folder``, called as they are and ``suffix``."""
    segments = [
        segment.model_copy(update={"file": f"{folder}/{segment.name}{suffix}"})
        for segment in plan.segments
    ]
    return plan.model_copy(update={"segments": tuple(segments)})


def routes_in(plan: Plan, segment: Segment) -> list[RouteStep]:
    """Return the routing points whose scores ``segment`` makes."""
    made = {tensor.name for tensor in segment.outputs}
    return [route for route in plan.routes if route.scores in made]


# Adds what makes a route's choices and weights [R, K], by their names, of its scores.
WriteChoices = Callable[[GraphWriter, RouteStep, str, str], None]


def write_choices(writer: GraphWriter, route: RouteStep, choices: str, weights: str) -> None:
    """Add the choices by standard operators; ties go to the lowest index where the runtime's do."""
    if route.weighting != "one":
        _write_best(writer, route, choices, weights)
        return
    writer.emit("ArgMax", [route.scores], choices, axis=1, keepdims=1)
    one = onnx_numpy.from_array(np.ones(1, np.float32))
    shape = writer.emit("Shape", [choices], f"{route.layer}/rows")
    writer.emit("ConstantOfShape", [shape], weights, value=one)


def with_routes(
    graph: ModelProto,
    routes: Sequence[RouteStep],
    segment: Segment,
    write: WriteChoices = write_choices,
) -> ModelProto:
    """Return ``graph`` with the choice of experts added; ``segment`` declares its ends."""
    writer = GraphWriter()
    for node in graph.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{segment.name}/{node.name}"  # values keep theirs
        writer.nodes.append(copy)
    writer.initializers |= {tensor.name: tensor for tensor in graph.graph.initializer}
    for route in routes:
        _write_route(writer, route, write)
    return writer.model(segment.name, segment.inputs, segment.outputs)


def _write_route(writer: GraphWriter, route: RouteStep, write: WriteChoices) -> None:
    """Add ids and weights."""
    (ids, weights), layer = rows_of(route), route.layer
    write(writer, route, choices_of(route), weights)
    write_ids(writer, route)
    if route.tokens is not None:
        shape = writer.integers(f"{layer}/shape", -1, route.tokens, route.top_k)
        writer.emit("Reshape", [ids, shape], route.expert_ids)
        writer.emit("Reshape", [weights, shape], route.weights)


def _write_best(writer: GraphWriter, route: RouteStep, choices: str, weights: str) -> None:
    layer, scores = route.layer, route.scores
    count = writer.integers(f"{layer}/k", route.top_k)
    writer.nodes.append(
        helper.make_node("TopK", [scores, count], [f"{layer}/best", choices], choices, axis=1)
    )
    shares = writer.emit("Softmax", [scores], f"{layer}/shares", axis=1)
    if route.weighting == "probability":
        writer.emit("GatherElements", [shares, choices], weights, axis=1)
        return
    chosen = writer.emit("GatherElements", [shares, choices], f"{layer}/chosen", axis=1)
    axis = writer.integers(f"{layer}/axis", 1)
    total = writer.emit("ReduceSum", [chosen, axis], f"{layer}/total", keepdims=1)
    little = writer.constant(f"{layer}/little", np.array(RENORMALISER, np.float32))
    divisor = writer.emit("Add", [total, little], f"{layer}/divisor")
    writer.emit("Div", [chosen, divisor], weights)

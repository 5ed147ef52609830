"""A TensorRT set as one graph: every expert gathers its own rows, and its answers are put in order.

Written for TensorRT, whose slices want sizes known before the run: what depends on data is only how
many rows ``NonZero`` finds, and an expert may get none. Whether TensorRT builds it, and whether it
is faster than an engine per expert, is for a GPU to say (``benchmarks/gpu/main.py``).

Shapes: R rows (images or tokens), K experts per row, S = R * K choices, M choices of one expert.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto
from onnx import numpy_helper as onnx_numpy

from advmoe_deploy.export.graph.stitch import write_segment
from advmoe_deploy.export.graph.writer import GraphWriter, value_info
from advmoe_deploy.export.tensorrt.row_graphs import write_weighted_sum
from advmoe_deploy.plan import ExpertsStep, Plan, RunStep, Segment

WHOLE = "whole"


def whole_plan(plan: Plan) -> Plan:
    """Return ``plan``, whose routes are inside of segments, as one segment."""
    tensors = plan.tensors()
    routed = [name for route in plan.inside for name in (route.expert_ids, route.weights)]
    segment = Segment(
        name=WHOLE,
        file=f"{WHOLE}.onnx",
        inputs=tuple(tensors[name] for name in plan.inputs),
        outputs=tuple(tensors[name] for name in dict.fromkeys([*plan.outputs, *routed])),
    )
    return plan.model_copy(update={"segments": (segment,), "steps": (RunStep(segment=WHOLE),)})


def whole_graph(plan: Plan, segments: Mapping[str, ModelProto]) -> ModelProto:
    """Return the graph of :func:`whole_plan`.

    Args:
        plan: a plan whose routes are inside of segments.
        segments: the graph of each of its segments, of standard operators and opset 17.
    """
    writer = GraphWriter()
    for step in plan.steps:
        if isinstance(step, RunStep):
            write_segment(writer, segments[step.segment])
        elif isinstance(step, ExpertsStep):
            _write_experts(writer, plan, step, segments)
    (whole,) = whole_plan(plan).segments
    model = writer.model(WHOLE, whole.inputs, whole.outputs)
    # Without a name, two numbers of rows are not known to be one, and additions are not fused.
    model.graph.value_info.extend(_rows_of_experts(plan))
    return model


def _rows_of_experts(plan: Plan) -> Iterator[ValueInfoProto]:
    for step in plan.steps:
        for name in step.segments if isinstance(step, ExpertsStep) else ():
            (given,) = plan.segment(name).inputs
            shape = (f"rows of {name}", *given.shape[1:])
            own = {"name": _own_rows(name), "shape": shape}
            yield value_info(given.model_copy(update=own))


def _own_rows(segment: str) -> str:
    return f"{segment}/own_rows"


def _write_experts(
    writer: GraphWriter, plan: Plan, step: ExpertsStep, segments: Mapping[str, ModelProto]
) -> None:
    route, layer, output = plan.route(step.layer), step.layer, plan.tensors()[step.output]
    weighted = route.weighting != "one"
    flat = writer.integers("flat", -1)
    ids_S = writer.emit("Reshape", [route.expert_ids, flat], f"{layer}/ids_S")
    shape = _shape_of_answers(writer, ids_S, layer, [int(size) for size in output.shape[1:]])
    zero = onnx_numpy.from_array(np.zeros(1, np.float32))
    each = writer.emit("ConstantOfShape", [shape], f"{layer}/none", value=zero)
    for expert, name in zip(route.kept, step.segments, strict=True):
        (given,), (answer,) = plan.segment(name).inputs, plan.segment(name).outputs
        places, rows = _write_rows(writer, ids_S, expert, name, route.top_k)
        own = writer.emit("Gather", [step.input, rows], _own_rows(name), axis=0)
        made = f"{name}/answers"
        write_segment(writer, segments[name], {given.name: own, answer.name: made})
        last = name == step.segments[-1] and not weighted
        after = step.output if last else f"{name}/so_far"
        each = writer.emit("ScatterND", [each, places, made], after)
    if weighted:
        write_weighted_sum(writer, each, route.weights, route.top_k, output)


def _shape_of_answers(writer: GraphWriter, ids_S: str, layer: str, rest: list[int]) -> str:
    count = writer.emit("Shape", [ids_S], f"{layer}/choices")
    sizes = writer.integers(f"{layer}/rest", *rest)
    return writer.emit("Concat", [count, sizes], f"{layer}/shape_of_answers", axis=0)


def _write_rows(
    writer: GraphWriter, ids_S: str, expert: int, name: str, top_k: int
) -> tuple[str, str]:
    """Add where an expert is chosen; return the names of its places [M, 1] and its rows [M]."""
    number = writer.constant(f"{name}/number", np.array(expert, np.int64))
    chosen = writer.emit("Equal", [ids_S, number], f"{name}/chosen")
    # TensorRT's NonZero takes floats only.
    as_float = writer.emit("Cast", [chosen], f"{name}/chosen_float", to=TensorProto.FLOAT)
    found = writer.emit("NonZero", [as_float], f"{name}/found")
    choices = writer.emit("Squeeze", [found, writer.integers("axis_0", 0)], f"{name}/choices")
    places = writer.emit("Unsqueeze", [choices, writer.integers("axis_1", 1)], f"{name}/places")
    if top_k == 1:
        return places, choices
    count = writer.constant(f"{name}/top_k", np.array(top_k, np.int64))
    return places, writer.emit("Div", [choices, count], f"{name}/rows")

"""Row graphs, which gather an expert's rows and scatter its answers, for memory of a device.

Any vendor of dense engines runs them; they hold no weights. The host gives them row numbers, and no
tensor but ids and answers has to cross. The runner is ``runtime.tensorrt.runner``.

Shapes: R rows of one expert, K experts per row, S choices, G rows in the regions of all experts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from onnx import ModelProto

from advmoe_deploy.export.graph.writer import GraphWriter
from advmoe_deploy.plan import ExpertsStep, Plan, TensorInfo
from advmoe_deploy.runtime.tensorrt.rows import (
    ALL_ROWS,
    GROUPED,
    OWN_ROWS,
    POSITIONS,
    ROWS,
    combine_name,
    dispatch_name,
    is_read_later,
    region_rows,
    rows_per_image,
)
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile, Shapes


@dataclass(frozen=True)
class RowGraph:
    """A graph beside those of a plan.

    ``inputs`` says of each how many rows belong to an image, and the rest of its shape; of
    ``experts`` there is a region each in :data:`~advmoe_deploy.runtime.tensorrt.rows.GROUPED`.
    """

    name: str
    graph: ModelProto
    inputs: Mapping[str, tuple[int, tuple[int, ...]]]
    experts: int

    def shapes(self, batch: BatchProfile) -> dict[str, Shapes]:
        """Return the shapes of the inputs that engines for ``batch`` are built for."""
        return {name: self._shapes(name, batch) for name in self.inputs}

    def _shapes(self, name: str, batch: BatchProfile) -> Shapes:
        factor, rest = self.inputs[name]
        least, best, most = factor * batch.min, factor * batch.opt, factor * batch.max
        if name == ROWS:
            least = 1
        elif name in (ALL_ROWS, GROUPED):  # always bound whole, by the profile of one row as well
            most = self.experts * region_rows(most, prod(rest)) if name == GROUPED else most
            least = best = most
        return Shapes((least, *rest), (best, *rest), (most, *rest))


def row_graphs(plan: Plan) -> tuple[RowGraph, ...]:
    """Return the graphs that move rows between the segments of ``plan``."""
    return tuple(_row_graphs(plan))


def _row_graphs(plan: Plan) -> Iterator[RowGraph]:
    for step in plan.steps:
        if isinstance(step, ExpertsStep):
            yield _dispatch(plan, step)
            if is_read_later(plan, step.output):
                yield _combine(plan, step)


def _dispatch(plan: Plan, step: ExpertsStep) -> RowGraph:
    """Return what gathers the rows of one expert."""
    given, name = plan.tensors()[step.input], dispatch_name(step)
    factor, rest = rows_per_image(plan, step.input), _rest(given)
    writer = GraphWriter()
    writer.emit("Gather", [ALL_ROWS, ROWS], OWN_ROWS, axis=0)
    graph = writer.model(
        name,
        [
            given.model_copy(update={"name": ALL_ROWS}),
            TensorInfo(name=ROWS, dtype="int64", shape=("R",)),
        ],
        [given.model_copy(update={"name": OWN_ROWS, "shape": ("R", *rest)})],
    )
    return RowGraph(name, graph, {ALL_ROWS: (factor, rest), ROWS: (factor, ())}, len(step.segments))


def _combine(plan: Plan, step: ExpertsStep) -> RowGraph:
    """Return what puts the experts' answers in order, weighted and summed where the route says."""
    route, output, name = plan.route(step.layer), plan.tensors()[step.output], combine_name(step)
    factor, rest = rows_per_image(plan, step.output), _rest(output)
    given = [
        TensorInfo(name=GROUPED, dtype="float32", shape=("G", *rest)),
        TensorInfo(name=POSITIONS, dtype="int64", shape=("S",)),
    ]
    inputs = {GROUPED: (factor, rest), POSITIONS: (factor * route.top_k, ())}
    writer = GraphWriter()
    if route.weighting == "one":
        writer.emit("Gather", [GROUPED, POSITIONS], step.output, axis=0)
    else:
        given.append(plan.tensors()[route.weights])
        inputs[route.weights] = 1, _rest(given[-1])
        each = writer.emit("Gather", [GROUPED, POSITIONS], "each", axis=0)
        write_weighted_sum(writer, each, route.weights, route.top_k, output)
    return RowGraph(name, writer.model(name, given, [output]), inputs, len(step.segments))


def write_weighted_sum(
    writer: GraphWriter, each: str, weights: str, top_k: int, output: TensorInfo
) -> None:
    """Add the sum over each row's experts of weight times answer; ``each`` has the answers [S]."""
    name, rest = output.name, _rest(output)
    by_choice = writer.integers(f"{name}/by_choice_shape", -1, top_k, *rest)
    beside = writer.integers(f"{name}/beside_shape", -1, top_k, *([1] * len(rest)))
    answers = writer.emit("Reshape", [each, by_choice], f"{name}/answers")
    shares = writer.emit("Reshape", [weights, beside], f"{name}/shares")
    weighted = writer.emit("Mul", [answers, shares], f"{name}/weighted")
    axis = writer.integers("axis_1", 1)
    writer.emit("ReduceSum", [weighted, axis], name, keepdims=0)


def _rest(tensor: TensorInfo) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape[1:])

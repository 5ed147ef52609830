"""Fusion of a plan into as few graphs as its compute dtypes allow.

Vendors take one compute dtype per graph: fp32, fp16 or bf16, with int8 where Q/DQ pairs say so.
Steps of one dtype that follow each other therefore become one graph, which routes inside; where it
changes, tensors cross to the next. Layers whose experts a vendor cannot run on no rows are left to
the host, which runs only experts that have rows.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from onnx import ModelProto

from advmoe_deploy.export.graph.op_bodies import without_custom_ops
from advmoe_deploy.export.graph.stitch import Form, rows_of, write_step
from advmoe_deploy.export.graph.writer import GraphWriter
from advmoe_deploy.plan import (
    ExpertsStep,
    Plan,
    RouteStep,
    RunStep,
    Segment,
    Step,
)
from advmoe_deploy.specs import ComputeDtype


@dataclass(frozen=True)
class Fused:
    """The plan, and the graph and the compute dtype of each of its segments."""

    plan: Plan
    graphs: dict[str, ModelProto]
    compute_dtypes: dict[str, ComputeDtype]


@dataclass
class _Group:
    """Steps that follow each other at one compute dtype, and what goes in and out.

    Without a compute dtype they are the host's, and no graph.
    """

    compute_dtype: ComputeDtype | None
    steps: list[Step] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def fuse(
    plan: Plan,
    segments: Mapping[str, ModelProto],
    compute_dtypes: Mapping[str, ComputeDtype],
    *,
    folder: str,
    form: Form,
    for_host: Collection[str] = (),
) -> Fused:
    """Return ``plan`` with its steps joined; ``compute_dtypes`` is that of its segments.

    The graphs belong in files of ``folder``. All experts of a layer have one compute dtype. The
    host dispatches layers in ``for_host``.
    """
    groups = list(_groups(_ordered(plan, for_host), compute_dtypes))
    _find_ends(plan, groups)
    parts: list[Segment] = []
    graphs: dict[str, ModelProto] = {}
    kinds: dict[str, ComputeDtype] = {}
    steps: list[Step] = []
    for number, group in enumerate(groups):
        if group.compute_dtype is None:
            names = [name for s in group.steps if isinstance(s, ExpertsStep) for name in s.segments]
            parts += [plan.segment(name) for name in names]
            graphs |= {name: segments[name] for name in names}
            kinds |= {name: compute_dtypes[name] for name in names}
            steps += group.steps
            continue
        name = "model" if len(groups) == 1 else f"model-{number}"
        parts.append(_part(plan, group, name, folder))
        graphs[name] = _graph(plan, group, segments, parts[-1], form)
        kinds[name] = group.compute_dtype
        steps.append(RunStep(segment=name))
    fused = Plan(
        segments=tuple(parts), steps=tuple(steps), inputs=plan.inputs, outputs=plan.outputs
    )
    return Fused(fused, graphs, kinds)


def _part(plan: Plan, group: _Group, name: str, folder: str) -> Segment:
    tensors = plan.tensors()
    return Segment(
        name=name,
        file=f"{folder}/{name}.onnx",
        inputs=tuple(tensors[tensor] for tensor in group.inputs),
        outputs=tuple(tensors[tensor] for tensor in group.outputs),
    )


# Steps for a graph, or for the host.
_Steps = list[tuple[Step, bool]]


def _ordered(plan: Plan, for_host: Collection[str]) -> _Steps:
    """Return the steps, and whether each is the host's; its routes move to their experts."""
    steps: _Steps = []
    for step in plan.steps:
        if isinstance(step, RunStep) or step.layer not in for_host:
            steps.append((step, False))
        elif isinstance(step, ExpertsStep):
            steps += [(plan.route(step.layer), True), (step, True)]
    return steps


def _groups(steps: _Steps, compute_dtypes: Mapping[str, ComputeDtype]) -> Iterator[_Group]:
    group: _Group | None = None
    for step, is_host in steps:
        kind = None if is_host else _compute_dtype(step, compute_dtypes)
        # A route belongs to what makes its scores: another graph would round them first.
        follows = isinstance(step, RouteStep) and not is_host
        if group is not None and (follows or kind == group.compute_dtype):
            group.steps.append(step)
            continue
        if group is not None:
            yield group
        group = _Group(kind, [step])
    if group is not None:
        yield group


def _compute_dtype(step: Step, compute_dtypes: Mapping[str, ComputeDtype]) -> ComputeDtype | None:
    match step:
        case RunStep():
            return compute_dtypes[step.segment]
        case ExpertsStep():
            (kind,) = {compute_dtypes[name] for name in step.segments}
            return kind
        case RouteStep():
            return None


def _find_ends(plan: Plan, groups: list[_Group]) -> None:
    """Fill in what crosses from group to group; outputs come from the group that makes them."""
    makers = [{name for step in g.steps for name in _made(plan, step)} for g in groups]
    needs = [dict.fromkeys(n for step in g.steps for n in _read(plan, step)) for g in groups]
    for index, group in enumerate(groups):
        group.inputs = [name for name in needs[index] if name not in makers[index]]
        later = {name for need in needs[index + 1 :] for name in need}
        wanted = [*plan.outputs, *sorted(later - {*plan.outputs})]
        group.outputs = [name for name in wanted if name in makers[index]]


def _read(plan: Plan, step: Step) -> list[str]:
    match step:
        case RunStep():
            return [tensor.name for tensor in plan.segment(step.segment).inputs]
        case RouteStep():
            return [step.scores]
        case ExpertsStep():
            route = plan.route(step.layer)
            weights = [] if route.weighting == "one" else [route.weights]
            return [step.input, route.expert_ids, *weights]


def _made(plan: Plan, step: Step) -> list[str]:
    match step:
        case RunStep():
            return [tensor.name for tensor in plan.segment(step.segment).outputs]
        case RouteStep():
            return [step.expert_ids, step.weights]
        case ExpertsStep():
            return [step.output]


def _graph(
    plan: Plan,
    group: _Group,
    segments: Mapping[str, ModelProto],
    part: Segment,
    form: Form,
) -> ModelProto:
    writer = GraphWriter()
    given = {tensor.name for tensor in part.inputs}
    for route in plan.routes:
        _write_rows(writer, route, given)
    for step in group.steps:
        write_step(writer, plan, step, segments, form)
    # Lower precisions are put into standard operators only.
    return without_custom_ops(writer.model(part.name, part.inputs, part.outputs))


def _write_rows(writer: GraphWriter, route: RouteStep, given: set[str]) -> None:
    """Add the ids and weights of tokens as [R, K], where another graph has routed them."""
    pairs = zip((route.expert_ids, route.weights), rows_of(route), strict=True)
    for name, rows in pairs:
        if name in given and rows != name:
            shape = writer.integers(f"{route.layer}/rows_shape", -1, route.top_k)
            writer.emit("Reshape", [name, shape], rows)

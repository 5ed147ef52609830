"""Check of every expert, whether or not an image visits it.

Exporters that trace lose experts that no example visited. Here the weights of all are looked for in
the whole graph. Each segment is run on what the torch model would give it, all rows through every
expert. Then the whole graph is run with each expert preferred in turn, the routers overruled,
against the torch model overruled in the same way.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, helper
from onnx import numpy_helper as onnx_numpy

from advmoe_deploy.bundle import MODEL
from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.graph.grouped import name_in_layer, taken_constants
from advmoe_deploy.export.graph.op_bodies import FUSED_ROUTERS
from advmoe_deploy.export.graph.writer import subgraphs_of, value_info
from advmoe_deploy.export.partition.sample import Sample
from advmoe_deploy.parity.answers import Answers, Images
from advmoe_deploy.parity.reference import Reference, bonus_for
from advmoe_deploy.parity.tolerance import require_near
from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, TensorInfo
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.specs import Precision

# Of the norm of the logits: more, and an expert is broken rather than rounded.
_RESEMBLANCE = 0.5
_LARGE_IN_FP16 = 3e4


def unvisited_experts(plan: Plan, answers: Answers) -> dict[str, list[int]]:
    """Return by layer the experts that no row of ``answers`` visits; no layer without any."""
    unvisited = {
        route.layer: [e for e in route.kept if not answers.routes[route.layer].expert_load[e]]
        for route in plan.routes
    }
    return {layer: experts for layer, experts in unvisited.items() if experts}


def require_every_expert(plan: Plan, model: ModelProto, segments: Mapping[str, ModelProto]) -> None:
    """Check that ``model`` holds all weights of every segment.

    An expert's are in its own branch, or, where experts are grouped, in its place among all.

    Raises:
        CheckFailedError: a weight is missing or differs.
    """
    main = {t.name: t for t in model.graph.initializer}
    steps = [step for step in plan.steps if isinstance(step, ExpertsStep)]
    experts = {name: step for step in steps for name in step.segments}
    linear = [node.name for node in model.graph.node if node.op_type == "ExpertLinear"]
    for segment in plan.segments:
        name, graph = segment.name, segments[segment.name]
        step = experts.get(name)
        if step is None:
            lacking = _lacking(graph, name, main)
        elif any(node.startswith(name_in_layer(step.layer, "")) for node in linear):
            lacking = _lacking_of(graph, step.layer, main, step.segments.index(name))
        else:
            lacking = _lacking(graph, name, _branch_constants(model, name))
        if lacking:
            raise CheckFailedError(
                f"model.onnx lacks {lacking[0]} of {name}; no bundle was written"
            )


def _lacking(graph: ModelProto, name: str, held: Mapping[str, TensorProto]) -> list[str]:
    """Return the weights of the segment called ``name`` that ``held`` does not hold."""
    contents = {t.name: _content(t) for t in held.values()}
    return [
        tensor.name
        for tensor in graph.graph.initializer
        if contents.get(f"{name}/{tensor.name}") != _content(tensor)
    ]


def _lacking_of(
    graph: ModelProto, layer: str, held: Mapping[str, TensorProto], index: int
) -> list[str]:
    """Return the weights that ``held`` does not hold for the expert at ``index`` of ``layer``."""
    lacking = []
    for name, values in taken_constants(graph).items():
        tensor = held.get(name_in_layer(layer, name))
        found = onnx_numpy.to_array(tensor) if tensor else np.empty(0)
        own = found[index] if found.ndim > values.ndim else found
        if own.dtype != values.dtype or not np.array_equal(own, values, equal_nan=True):
            lacking.append(name)
    return lacking


def _branch_constants(model: ModelProto, segment: str) -> dict[str, TensorProto]:
    branches = [
        graph
        for node in model.graph.node
        if node.op_type == "If"
        for graph in subgraphs_of(node)
        if graph.name == f"{segment}/then_branch"
    ]
    if len(branches) != 1:
        raise CheckFailedError(
            f"model.onnx has {len(branches)} branches for {segment}, not 1; no bundle was written"
        )
    return {t.name: t for t in branches[0].initializer}


def require_segments(files: Mapping[str, Path], samples: Mapping[str, Sample]) -> None:
    """Check each segment's file on what the torch model gives it and answers.

    Raises:
        CheckFailedError: a segment answers something else.
    """
    for name, sample in samples.items():
        with OrtEngine(files[name]) as engine:
            answers = engine.run(sample.inputs)
        for output, expected in sample.outputs.items():
            require_near(answers[output], expected, sample.rounding(output), f"{output} of {name}")


def require_branches(reference: Reference, plan: Plan, graph: ModelProto, images: Images) -> None:
    """Check ``graph``, the whole of a model, with each expert preferred in turn by every layer.

    Raises:
        CheckFailedError: the logits differ from the torch model's.
    """
    if not plan.routes:
        return
    with OrtEngine(overruled_graph(graph, plan).SerializeToString()) as engine:
        for expert in range(max(route.num_experts for route in plan.routes)):
            bonuses = {_bonus(route): _bonus_of(route, expert) for route in plan.routes}
            logits = engine.run({"images": images, **bonuses})["logits"]
            expected = reference.answers(images, preferred=expert)
            rounding = reference.rounding(images, preferred=expert)
            require_near(logits, expected.logits, rounding, f"expert {expert} in {MODEL}")


def overruled_graph(graph: ModelProto, plan: Plan) -> ModelProto:
    """Return a copy of ``graph`` that adds another input, by layer [E], to the scores.

    Where a fused router makes them, the bonus is added to its bias.
    """
    overruled = ModelProto()
    overruled.CopyFrom(graph)
    for route in plan.routes:
        bonus = TensorInfo(name=_bonus(route), dtype="float32", shape=(len(route.kept),))
        overruled.graph.input.append(value_info(bonus))
        nodes = overruled.graph.node
        (made,) = (i for i, node in enumerate(nodes) if route.scores in node.output)
        if nodes[made].op_type in FUSED_ROUTERS:
            plain, readers = nodes[made].input[2], [nodes[made]]
        else:
            plain, readers, made = route.scores, list(nodes), made + 1
        raised = f"{route.scores} and bonus"
        for node in readers:
            node.input[:] = [raised if name == plain else name for name in node.input]
        nodes.insert(made, helper.make_node("Add", [plain, bonus.name], [raised], raised))
    return overruled


def require_weights(
    graphs: Mapping[str, ModelProto], segments: Mapping[str, ModelProto], what: str
) -> None:
    """Check that ``graphs`` together hold all weights of every segment.

    Raises:
        CheckFailedError: a weight is missing or differs.
    """
    # A segment is part of a graph, where its name comes first, or a graph of its own.
    held = {t.name: _content(t) for g in graphs.values() for t in _constants(g.graph)}
    held |= {f"{n}/{t.name}": _content(t) for n, g in graphs.items() for t in _constants(g.graph)}
    for name, segment in segments.items():
        for tensor in segment.graph.initializer:
            if held.get(f"{name}/{tensor.name}") != _content(tensor):
                raise CheckFailedError(
                    f"{what} lacks {tensor.name} of {name}; no bundle was written"
                )


def _content(tensor: TensorProto) -> bytes:
    """Return all of ``tensor`` but its name: values may stand in one of several fields."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = ""
    return bytes(copy.SerializeToString(deterministic=True))


def _constants(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for branch in subgraphs_of(node):
            yield from _constants(branch)


def require_forced(
    reference: Reference,
    plan: Plan,
    graphs: Mapping[str, ModelProto],
    images: Images,
    open_runner: Callable[[Mapping[str, ModelProto]], Runner],
    precision: Precision,
) -> None:
    """Check ``graphs``, which run one after the other, with each expert preferred in turn.

    In fp32 the logits must be the torch model's; at a lower precision they must resemble them.

    Raises:
        CheckFailedError: they do not.
    """
    experts = max((route.num_experts for route in plan.routes), default=0)
    for expert in range(experts):
        changed = {name: _preferring(g, plan, expert, precision) for name, g in graphs.items()}
        with open_runner(changed) as runner:
            logits = runner.infer(images).logits
        expected = reference.answers(images, preferred=expert).logits
        what = f"expert {expert} in {precision}"
        if precision == "fp32":
            require_near(logits, expected, reference.rounding(images, preferred=expert), what)
            continue
        error = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
        if not error <= _RESEMBLANCE:
            raise CheckFailedError(
                f"{what} differs from the torch model by {error:.0%} of its logits (limit "
                f"{_RESEMBLANCE:.0%}); no bundle was written"
            )


def _preferring(graph: ModelProto, plan: Plan, expert: int, precision: Precision) -> ModelProto:
    """Return ``graph`` with ``expert`` preferred by every layer that is routed in it."""
    changed = ModelProto()
    changed.CopyFrom(graph)
    nodes = changed.graph.node
    for route in plan.routes:
        makers = [i for i, node in enumerate(nodes) if route.scores in node.output]
        if not makers:
            continue
        alone = f"{route.scores} alone"
        maker = nodes[makers[0]]
        maker.output[:] = [alone if name == route.scores else name for name in maker.output]
        bonus_E = _bonus_of(route, expert)
        if precision == "fp16":
            bonus_E = bonus_E.clip(max=_LARGE_IN_FP16)
        changed.graph.initializer.append(onnx_numpy.from_array(bonus_E, _bonus(route)))
        add = helper.make_node("Add", [alone, _bonus(route)], [route.scores], route.scores)
        nodes.insert(makers[0] + 1, add)
    return changed


def _bonus(route: RouteStep) -> str:
    return f"{route.layer}.bonus"


def _bonus_of(route: RouteStep, expert: int) -> NDArray[np.float32]:
    """Return what prefers ``expert`` among those that ``route`` keeps: nothing where it is gone."""
    return bonus_for(expert, route.num_experts)[list(route.kept)]

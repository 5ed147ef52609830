"""Every expert is checked, whether or not an image visits it.

Exporters that trace lose experts that no example visited. Here the weights of all are looked for in
the whole graph. Each segment is run on what the torch model would give it, all rows through every
expert. Then the whole graph is run with each expert preferred in turn, the routers overruled,
against the torch model overruled in the same way.
"""

from collections.abc import Mapping
from pathlib import Path

from onnx import ModelProto, helper

from advmoe_deploy.bundle import MODEL
from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.onnx_graph import subgraphs_of, value_info
from advmoe_deploy.export.reference import Answers, Images, Reference, bonus_for
from advmoe_deploy.export.sample import Sample
from advmoe_deploy.export.tolerance import require_near, rounding_of
from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, TensorInfo
from advmoe_deploy.runtime.ort_engine import OrtEngine


def unvisited_experts(answers: Answers) -> dict[str, list[int]]:
    """Return by layer the experts that no row of ``answers`` visits; no layer without any."""
    unvisited = {
        layer: [expert for expert, rows in enumerate(route.expert_load) if rows == 0]
        for layer, route in answers.routes.items()
    }
    return {layer: experts for layer, experts in unvisited.items() if experts}


def require_every_expert(plan: Plan, model: ModelProto, segments: Mapping[str, ModelProto]) -> None:
    """Check that ``model`` holds all weights of every segment, each expert's in its own branch.

    Raises:
        CheckFailedError: a weight is missing or differs.
    """
    experts = {name for s in plan.steps if isinstance(s, ExpertsStep) for name in s.segments}
    main = {t.name: t.raw_data for t in model.graph.initializer}
    for segment in plan.segments:
        held = _branch_constants(model, segment.name) if segment.name in experts else main
        for tensor in segments[segment.name].graph.initializer:
            if held.get(f"{segment.name}/{tensor.name}") != tensor.raw_data:
                raise CheckFailedError(
                    f"model.onnx lacks {tensor.name} of {segment.name}; no bundle was written"
                )


def _branch_constants(model: ModelProto, segment: str) -> dict[str, bytes]:
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
    return {t.name: t.raw_data for t in branches[0].initializer}


def require_segments(files: Mapping[str, Path], samples: Mapping[str, Sample]) -> None:
    """Check each segment's file on what the torch model gives it and answers.

    Raises:
        CheckFailedError: a segment answers something else.
    """
    for name, sample in samples.items():
        with OrtEngine(files[name]) as engine:
            answers = engine.run(sample.inputs)
        for output, expected in sample.outputs.items():
            rounding = rounding_of(expected, sample.exact[output])
            require_near(answers[output], expected, rounding, f"{output} of {name}")


def require_branches(reference: Reference, plan: Plan, graph: ModelProto, images: Images) -> None:
    """Check ``graph``, the whole of a model, with each expert preferred in turn by every layer.

    Raises:
        CheckFailedError: the logits differ from the torch model's.
    """
    if not plan.routes:
        return
    with OrtEngine(overruled_graph(graph, plan).SerializeToString()) as engine:
        for expert in range(max(route.num_experts for route in plan.routes)):
            bonuses = {_bonus(route): bonus_for(expert, route.num_experts) for route in plan.routes}
            logits = engine.run({"images": images, **bonuses})["logits"]
            expected = reference.answers(images, preferred=expert)
            rounding = reference.rounding(images, preferred=expert)
            require_near(logits, expected.logits, rounding, f"expert {expert} in {MODEL}")


def overruled_graph(graph: ModelProto, plan: Plan) -> ModelProto:
    """Return a copy of ``graph`` that adds another input, by layer [E], to the scores."""
    overruled = ModelProto()
    overruled.CopyFrom(graph)
    for route in plan.routes:
        bonus = TensorInfo(name=_bonus(route), dtype="float32", shape=(route.num_experts,))
        overruled.graph.input.append(value_info(bonus))
        nodes = overruled.graph.node
        (made,) = (i for i, node in enumerate(nodes) if route.scores in node.output)
        raised = f"{route.scores} and bonus"
        for node in nodes:
            node.input[:] = [raised if name == route.scores else name for name in node.input]
        add = helper.make_node("Add", [route.scores, bonus.name], [raised], raised)
        nodes.insert(made + 1, add)
    return overruled


def _bonus(route: RouteStep) -> str:
    return f"{route.layer}.bonus"

"""Is every expert really in the graph? Exporters that trace lose experts no example visited."""

from collections.abc import Mapping

from onnx import ModelProto

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.onnx_graph import subgraphs_of
from advmoe_deploy.plan import ExpertsStep, Plan


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

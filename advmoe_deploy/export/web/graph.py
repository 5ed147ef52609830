"""A bundle's graph as browsers run it: standard operators alone, and the scores of its routers."""

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, checker, inliner

from advmoe_deploy.bundle import MODEL, Bundle
from advmoe_deploy.errors import BundleError, CheckFailedError, printable
from advmoe_deploy.export.graph.op_bodies import nodes_of
from advmoe_deploy.export.graph.writer import value_info
from advmoe_deploy.parity.compare import compare_answers, predictions_of
from advmoe_deploy.parity.golden import read_golden
from advmoe_deploy.plan import Plan
from advmoe_deploy.runtime.onnxruntime.graph_runner import GraphRunner

# How far logits may be from the golden ones, relative to a row's largest where that exceeds 1.
LIMIT = 1e-4


def browser_graph(bundle: Bundle) -> bytes:
    """Return the whole model, with its function bodies in the place of custom operators.

    Scores that the plan names become outputs, too: what a route's margin is read from. The graph
    has answered the bundle's golden images natively, without our kernels.

    Raises:
        BundleError: the graph cannot be read, or has an operator that is neither standard nor has a
            body.
        CheckFailedError: it answers otherwise than the model that was exported.
    """
    try:
        model = onnx.load_model_from_string(bundle.graph(MODEL).read())
        standard = _standard(_with_scores(model, bundle.manifest.plan), bundle)
    except (DecodeError, checker.ValidationError) as error:  # the latter of bodies in a circle
        reason = printable(" ".join(str(error).split()))
        raise BundleError(
            f"{bundle.path / MODEL} cannot be read: {reason:.300}; export the bundle again"
        ) from None
    graph: bytes = standard.SerializeToString()
    _require_golden(graph, bundle)
    return graph


def scores_in(graph: bytes, plan: Plan) -> set[str]:
    """Return the names of the scores that ``graph`` answers with."""
    outputs = {output.name for output in onnx.load_model_from_string(graph).graph.output}
    return outputs & {route.scores for route in plan.routes}


def _with_scores(model: ModelProto, plan: Plan) -> ModelProto:
    made = {name for node in model.graph.node for name in node.output}
    outputs, tensors = {output.name for output in model.graph.output}, plan.tensors()
    for route in plan.routes:
        if route.scores in (made & tensors.keys()) - outputs:
            model.graph.output.append(value_info(tensors[route.scores]))
    return model


def _standard(model: ModelProto, bundle: Bundle) -> ModelProto:
    inlined = inliner.inline_local_functions(model)
    left = {f"{n.domain}.{n.op_type}" for n in nodes_of(inlined.graph) if n.domain}
    if left:
        raise BundleError(
            f"{bundle.path / MODEL} has operators without bodies, which no browser knows: "
            f"{', '.join(sorted(left))}; export the bundle again"
        )
    kept = [entry for entry in inlined.opset_import if not entry.domain]
    del inlined.opset_import[:]
    inlined.opset_import.extend(kept)
    return inlined


def _require_golden(graph: bytes, bundle: Bundle) -> None:
    manifest = bundle.manifest
    routes, parity = manifest.plan.routes, manifest.parity
    images, answers = read_golden(bundle, [route.layer for route in routes])
    with GraphRunner(graph, manifest.model.image_shape, routes=routes) as runner:
        found = predictions_of(runner, images)
    report = compare_answers(answers, found, rounding=parity.rounding, margin=parity.margin)
    limit = max(LIMIT, report.logit_tolerance)
    wrong = report.non_finite or report.route_flips or not report.compared
    if wrong or not report.max_relative_logit_diff <= limit:
        raise CheckFailedError(
            f"the graph for browsers answers the golden images of {bundle.path} otherwise than "
            f"the model that was exported: {report.route_flips} clear routes flipped, logits "
            f"differ by {report.max_relative_logit_diff:.3g} (limit {limit:.3g}); "
            "export the bundle again"
        )

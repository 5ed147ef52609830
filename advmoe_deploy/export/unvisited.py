"""Experts that no image visits: their branch of the graph is run too, the router overruled."""

import numpy as np
from onnx import ModelProto
from onnx import numpy_helper as onnx_numpy

from advmoe_deploy.bundle import MODEL
from advmoe_deploy.export.parity import load_of, require_near
from advmoe_deploy.export.reference import Answers, Images, forced_answers
from advmoe_deploy.models.advmoe import AdvMoE
from advmoe_deploy.plan import Plan
from advmoe_deploy.runtime.runner import GraphRunner

_CERTAIN = 1e30  # above any score, and a float32 still


def unvisited_experts(answers: Answers) -> list[int]:
    """Return the experts to which no image of ``answers`` goes."""
    return [expert for expert, images in enumerate(load_of(answers)) if images == 0]


def require_branch(
    model: AdvMoE, plan: Plan, graph: ModelProto, images: Images, expert: int
) -> None:
    """Check ``graph``, the whole model, with every image sent to ``expert``.

    Raises:
        CheckFailedError: the logits differ from the torch model's.
    """
    (route,) = plan.routes
    forced = forced_graph(graph, route.scores, expert).SerializeToString()
    with GraphRunner(forced, model.spec.image_shape, routes=plan.routes) as runner:
        logits = runner.infer(images).logits
    require_near(logits, forced_answers(model, images, expert), f"expert {expert} in {MODEL}")


def forced_graph(graph: ModelProto, scores: str, expert: int) -> ModelProto:
    """Return a copy of ``graph`` in which the layer that makes ``scores`` prefers ``expert``."""
    forced = ModelProto()
    forced.CopyFrom(graph)
    (layer,) = (node for node in forced.graph.node if scores in node.output)
    (bias,) = (t for t in forced.graph.initializer if t.name == layer.input[2])
    values = np.array(onnx_numpy.to_array(bias))
    values[expert] = _CERTAIN
    bias.CopyFrom(onnx_numpy.from_array(values, bias.name))
    return forced

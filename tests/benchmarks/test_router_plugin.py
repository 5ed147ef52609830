"""The graph in which a plugin decides, run with the rule in the plugin's place."""

from typing import Any

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from advmoe_deploy.export.partition.cut import partition
from advmoe_deploy.export.tensorrt.graphs import routes_in, tensorrt_plan, with_routes
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.plan import RouteStep
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.routing import route as routed
from benchmarks.gpu.experiments.router_graph import plugin_of, with_plugins
from tests.families import spec_of

IMAGES = np.random.default_rng(3).random((5, 1, 8, 8), dtype=np.float32)


def plugin(route: RouteStep) -> type[OpRun]:
    """Return the operator that decides as the plugin should."""
    rows = route.model_copy(update={"tokens": None})

    class Plugin(OpRun):
        op_domain = ""

        def _run(self, scores: np.ndarray, **words: Any) -> tuple[np.ndarray, ...]:
            assert words == {"plugin_namespace": "advmoe", "plugin_version": "1"}
            made = routed(rows, scores)
            return made[rows.expert_ids].astype(np.int32), made[rows.weights]

    Plugin.__name__ = plugin_of(route)
    return Plugin


@pytest.mark.parametrize("family", ["conv experts", "dual model", "token experts"])
def test_a_plugin_takes_the_place_of_softmax_and_top_k(family: str) -> None:
    parts = partition(untrained_model(spec_of(family), torch.from_numpy(IMAGES)))
    plan = tensorrt_plan(parts.plan, "engines/x", ".onnx")
    own = next(s for s in parts.plan.segments if routes_in(parts.plan, s))
    segment, routes = plan.segment(own.name), routes_in(parts.plan, own)
    inputs = {"images": IMAGES}
    with OrtEngine(
        with_routes(parts.graphs[own.name], routes, segment).SerializeToString()
    ) as engine:
        expected = engine.run(inputs)
    graph = with_plugins(parts.graphs[own.name], routes, segment)
    # A vision transformer has a softmax of its own.
    left = {node.op_type for node in graph.graph.node} & {"TopK", "ArgMax", "GatherElements"}
    assert not left
    evaluator = ReferenceEvaluator(graph, new_ops=[plugin(route) for route in routes])
    answer = dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True))
    assert answer.keys() == expected.keys()
    for name, values in expected.items():
        assert answer[name].dtype == values.dtype
        np.testing.assert_allclose(answer[name], values, atol=1e-5)

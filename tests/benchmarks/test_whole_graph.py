"""The model as one graph for TensorRT: standard operators, and experts without rows."""

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto

from advmoe_deploy.export.partition.cut import partition
from advmoe_deploy.export.passes.apply import apply_passes
from advmoe_deploy.export.tensorrt.graphs import routes_in, tensorrt_plan, with_routes
from advmoe_deploy.export.tensorrt.row_graphs import row_graphs
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.plan import ExpertsStep, Plan
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.tensorrt.runner import DeviceRunner
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile
from benchmarks.gpu.experiments.whole_graph import WHOLE, whole_graph, whole_plan
from tests.families import spec_of

IMAGES = np.random.default_rng(1).random((24, 1, 8, 8), dtype=np.float32)
BATCH = BatchProfile(min=1, opt=8, max=18)


def routed_inside(family: str) -> tuple[Plan, dict[str, ModelProto]]:
    """Return the plan and the graphs of a set, such as TensorRT is given."""
    model = untrained_model(spec_of(family), torch.from_numpy(IMAGES))
    parts, _ = apply_passes(partition(model), IMAGES, model.rules)
    plan = tensorrt_plan(parts.plan, "engines/x", ".onnx")
    return plan, {
        s.name: with_routes(parts.graphs[s.name], routes_in(parts.plan, s), plan.segment(s.name))
        for s in parts.plan.segments
    }


def runner(plan: Plan, graphs: Mapping[str, ModelProto]) -> DeviceRunner:
    return DeviceRunner.over_engines(
        plan,
        {name: graph.SerializeToString() for name, graph in graphs.items()},
        (1, 8, 8),
        open_engine=lambda _, graph: OrtEngine(graph, threads=1),
        batch=BATCH,
        name="onnxruntime",
    )


@pytest.mark.parametrize(
    "family", ["conv experts", "block experts", "wide ResNet", "dual model", "token experts"]
)
def test_one_graph_answers_as_many(family: str) -> None:
    plan, graphs = routed_inside(family)
    whole = whole_graph(plan, graphs)
    onnx.checker.check_model(whole, full_check=True)
    assert not whole.functions
    assert {(entry.domain, entry.version) for entry in whole.opset_import} == {("", 17)}
    assert {node.domain for node in whole.graph.node} <= {""}
    operators = {node.op_type for node in whole.graph.node}
    # Slices of a size that depends on data, and branches of two shapes, TensorRT would not take.
    assert not {"If", "Loop", "Slice", "Range", "CumSum"} & operators
    found = {name for n in whole.graph.node if n.op_type == "NonZero" for name in n.output}
    assert len(found) == sum(len(s.segments) for s in plan.steps if isinstance(s, ExpertsStep))
    parts = {**graphs, **{row_graph.name: row_graph.graph for row_graph in row_graphs(plan)}}
    with runner(plan, parts) as many, runner(whole_plan(plan), {WHOLE: whole}) as one:
        # Of a single image, all but its own experts get no row.
        for images in (IMAGES, IMAGES[:1], IMAGES[5:6], IMAGES[2:13]):
            answer, expected = one.infer(images), many.infer(images)
            np.testing.assert_allclose(answer.logits, expected.logits, rtol=0, atol=1e-5)
            assert answer.expert_ids.keys() == expected.expert_ids.keys()
            for layer, ids in expected.expert_ids.items():
                np.testing.assert_array_equal(answer.expert_ids[layer], ids)
                np.testing.assert_allclose(answer.weights[layer], expected.weights[layer], 1e-6)

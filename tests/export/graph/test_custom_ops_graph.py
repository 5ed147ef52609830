"""The whole graph with custom operators: routers are fused or say why not, no shape is hidden."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import GraphProto, ModelProto, helper

from advmoe_deploy.export.graph.stitch import graph_from_plan
from advmoe_deploy.export.graph.writer import constants_of, replace_constants, subgraphs_of
from advmoe_deploy.export.partition.cut import Partition, partition
from advmoe_deploy.export.passes import fuse_router as module
from advmoe_deploy.export.passes.fuse_router import fuse_router, fuse_router_checked
from advmoe_deploy.export.passes.report import PassReport
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.runtime.onnxruntime.custom_ops import DOMAIN, find_custom_ops
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.specs import ModelSpec
from tests.conftest import TINY
from tests.families import spec_of

IMAGES = np.random.default_rng(0).random((8, 1, 8, 8), dtype=np.float32)
KERNELS = find_custom_ops("auto")


def parts_of(spec: ModelSpec) -> Partition:
    return partition(untrained_model(spec, torch.from_numpy(IMAGES)))


def graph_of(spec: ModelSpec) -> ModelProto:
    parts = parts_of(spec)
    return graph_from_plan(parts.plan, parts.graphs)


def custom_ops_in(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.domain == DOMAIN]


def answers(model: ModelProto) -> dict[str, np.ndarray]:
    with OrtEngine(model.SerializeToString(), threads=1) as engine:
        return engine.run({"images": IMAGES})


GATES = {
    "advmoe": ["PoolLinearRouterTop1"],
    "block experts": ["PoolLinearRouterTopKProbability"] * 2,
    "token experts": ["LinearRouterTopKProbability"] * 2,
}


@pytest.mark.parametrize("family", GATES)
def test_the_tail_of_a_gate_joins_the_router(family: str) -> None:
    model = graph_of(TINY if family == "advmoe" else spec_of(family))
    before = answers(model)
    report = fuse_router_checked(model, {"images": IMAGES})
    assert report == PassReport("fuse_router", len(GATES[family]))
    assert [name for name in custom_ops_in(model) if "Router" in name] == GATES[family]
    assert {body.name for body in model.functions} == set(custom_ops_in(model))
    onnx.checker.check_model(model, full_check=True)
    for name, values in answers(model).items():
        np.testing.assert_allclose(values, before[name], rtol=0, atol=1e-5)


def test_a_gate_without_a_linear_layer_stays_and_says_why() -> None:
    model = graph_of(spec_of("conv experts"))
    report = fuse_router_checked(model, {"images": IMAGES})
    assert report.applied == 0
    assert report.declined
    for reason in report.declined:
        assert reason.endswith(": its scores do not come from a linear layer")
    assert "RouterTopKRenormalised" in custom_ops_in(model)


def test_means_that_others_read_too_stay() -> None:
    model = graph_of(TINY)
    (gemm,) = (n for n in model.graph.node if "router.scores" in n.output)
    model.graph.node.append(helper.make_node("Neg", [gemm.input[0]], ["other"], "other"))
    assert fuse_router(model).applied == 1
    assert "LinearRouterTop1" in custom_ops_in(model)


def scaled(model: ModelProto) -> None:
    (gemm,) = (n for n in model.graph.node if "router.scores" in n.output)
    gemm.attribute.append(helper.make_attribute("alpha", 2.0))


def computed(model: ModelProto) -> None:
    (gemm,) = (n for n in model.graph.node if "router.scores" in n.output)
    model.graph.node.insert(0, helper.make_node("Identity", [gemm.input[1]], ["weight"], "weight"))
    gemm.input[1] = "weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [(scaled, "scaled or transposed"), (computed, "not float32 constants")],
)
def test_fusing_declines_with_a_reason(change: Callable[[ModelProto], None], reason: str) -> None:
    model = graph_of(TINY)
    change(model)
    before = answers(model)
    report = fuse_router_checked(model, {"images": IMAGES})
    assert report.applied == 0
    assert reason in report.declined[0]
    np.testing.assert_array_equal(answers(model)["logits"], before["logits"])


def test_a_fusion_that_scores_otherwise_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: ModelProto) -> PassReport:
        report = fuse_router(model)
        (node,) = (n for n in model.graph.node if n.op_type.startswith("PoolLinear"))
        bias = constants_of(model)[node.input[2]] + np.float32(0.01)
        replace_constants(model, {node.input[2]: bias})
        return report

    monkeypatch.setattr(module, "fuse_router", spoil)
    model = graph_of(TINY)
    before = answers(model)
    report = fuse_router_checked(model, {"images": IMAGES})
    assert report.applied == 0
    assert "router.scores would be 0.01 from its value in float64" in report.declined[0]
    assert "PoolLinear" not in str(operators(model.graph))
    np.testing.assert_array_equal(answers(model)["logits"], before["logits"])


def operators(graph: GraphProto) -> Counter[str]:
    """Count the operators of a graph and of its branches."""
    found = Counter(node.op_type for node in graph.node)
    for node in graph.node:
        for branch in subgraphs_of(node):
            found += operators(branch)
    return found


@pytest.mark.skipif(KERNELS.library is None, reason=KERNELS.reason)
def test_kernels_hide_no_shape_from_the_optimiser(tmp_path: Path) -> None:
    """What ONNX Runtime fuses in the experts, it fuses with kernels, too."""
    model = graph_of(TINY.model_copy(update={"width": 32})).SerializeToString()
    counts = {}
    for form in ("bodies", "kernels"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(tmp_path / form)
        if form == "kernels":
            options.register_custom_ops_library(str(KERNELS.library))
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        found = operators(onnx.load_model(tmp_path / form).graph)
        counts[form] = {name: found[name] for name in ("Conv", "Add", "Relu", "Reshape")}
    bodies, kernels = counts["bodies"], counts["kernels"]
    assert kernels["Conv"] == bodies["Conv"] > 0
    for name in ("Add", "Relu", "Reshape"):
        assert kernels[name] <= bodies[name], name

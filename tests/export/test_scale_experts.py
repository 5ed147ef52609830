"""The scale of a normalisation moves into the experts, or the pass says why not."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from advmoe_deploy.export.graph.stitch import graph_from_plan
from advmoe_deploy.export.graph.writer import constants_of, replace_constants
from advmoe_deploy.export.partition.cut import Partition, partition
from advmoe_deploy.export.passes import apply
from advmoe_deploy.export.passes.apply import apply_passes
from advmoe_deploy.export.passes.report import PassReport
from advmoe_deploy.export.passes.scale_experts import scale_experts
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.dispatch import run_experts
from advmoe_deploy.models.routing.routing import Routes, RoutingRule
from advmoe_deploy.runtime.onnxruntime.graph_runner import GraphRunner
from tests.families import FAMILIES, Families, spec_of

IMAGES = np.random.default_rng(0).random((9, 1, 8, 8), dtype=np.float32)


class ConvExperts(Classifier):
    """Two of three convolutions, their weighted sum, a normalisation."""

    def __init__(self, *, bias: bool = False, twice: bool = False, relu: bool = False) -> None:
        super().__init__(spec_of("dense ViT"))
        self.rules = (RoutingRule("only", 3, 2, "renormalised"),)
        self.gate = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        end = nn.ReLU() if relu else nn.Identity()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(1, 4, 3, bias=bias), end) for _ in range(3)
        )
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 10)
        self.twice = twice
        with torch.no_grad():
            self.norm.running_mean.copy_(torch.tensor([0.3, -1.0, 2.0, 0.0]))
            self.norm.running_var.copy_(torch.tensor([0.5, 4.0, 1.0, 0.1]))
            self.norm.weight.copy_(torch.tensor([2.0, -0.5, 1.0, 3.0]))
            self.norm.bias.copy_(torch.tensor([1.0, 0.25, 0.0, -2.0]))

    def forward(self, images: Tensor, routes: Routes | None = None) -> Tensor:
        routes = routes or Routes()
        routing = routes.decide(self.rules[0], self.gate, images)
        y = run_experts(routing, images, list(self.experts), routes.execution)
        z = self.norm(y) + y if self.twice else self.norm(y)
        logits: Tensor = self.head(z.relu().mean((2, 3)))
        return logits


def model_of(**how: bool) -> ConvExperts:
    torch.manual_seed(0)
    return ConvExperts(**how).eval()


def logits_of(parts: Partition, model: Classifier) -> np.ndarray:
    graph = graph_from_plan(parts.plan, parts.graphs).SerializeToString()
    with GraphRunner(graph, model.spec.image_shape, routes=parts.plan.routes) as runner:
        return runner.infer(IMAGES).logits


def operators(parts: Partition) -> list[str]:
    return [node.op_type for graph in parts.graphs.values() for node in graph.graph.node]


@pytest.mark.parametrize("bias", [False, True])
def test_the_scale_moves_and_the_logits_stay(bias: bool) -> None:
    model = model_of(bias=bias)
    parts = partition(model)
    weight = constants_of(parts.graphs["only.expert-1"])["weight"]
    parts, reports = apply_passes(parts, IMAGES)
    assert reports["plan"] == (PassReport("scale_experts", 1),)
    assert "BatchNormalization" not in operators(parts)
    factor_C = (model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()).detach()
    scaled = constants_of(parts.graphs["only.expert-1"])["weight"]
    np.testing.assert_allclose(scaled, weight * factor_C.numpy()[:, None, None, None], rtol=1e-6)
    with torch.inference_mode():
        expected = model(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(logits_of(parts, model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"twice": True}, "something else than the normalisation reads the combination too"),
        ({"relu": True}, "an expert does not end in a convolution"),
    ],
)
def test_it_declines_with_a_reason(how: dict[str, bool], reason: str) -> None:
    model = model_of(**how)
    parts, report = scale_experts(partition(model))
    assert report == PassReport("scale_experts", 0, (f"only: {reason}",))
    assert "BatchNormalization" in operators(parts)
    with torch.inference_mode():
        expected = model(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(logits_of(parts, model), expected, rtol=0, atol=1e-5)


def test_shared_weights_are_left_alone() -> None:
    parts = partition(model_of())
    graph = parts.graphs["only.expert-0"].graph
    reader = helper.make_node("Identity", ["weight"], ["copy"], "copy")
    graph.node.insert(0, reader)
    _, report = scale_experts(parts)
    assert report.declined == (
        "only: another node shares the weights of an expert's last convolution",
    )


def test_a_scale_that_goes_wrong_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(parts: Partition) -> tuple[Partition, PassReport]:
        parts, report = scale_experts(parts)
        graph = parts.graphs["only.expert-2"]
        replace_constants(graph, {"weight": 2 * constants_of(graph)["weight"]})
        return parts, report

    monkeypatch.setattr(apply, "scale_experts", wrong)
    parts = partition(model_of())
    before = operators(parts)
    parts, reports = apply_passes(parts, IMAGES)
    (report,) = reports["plan"]
    assert report.applied == 0
    assert report.declined[0].startswith("only.expert-2: only.output would be")
    assert operators(parts) == before
    with torch.inference_mode():
        expected = model_of()(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(logits_of(parts, model_of()), expected, rtol=0, atol=1e-5)


_LARGE = {"DenseNet", "ResNet-50", "bottleneck experts", "wide ResNet"}


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f in _LARGE else f for f in FAMILIES]
)
def test_nothing_is_left_to_fold(families: Families, family: str) -> None:
    """No node of a segment reads constants alone."""
    _, bundle = families[family]
    for segment in bundle.manifest.plan.segments:
        model = onnx.load_model(bundle.file(segment.file))
        constants = {*constants_of(model)}
        assert not [n.name for n in model.graph.node if n.input and {*n.input} <= constants]

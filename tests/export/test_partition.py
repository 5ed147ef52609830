"""Cutting at the marks, on models small enough to follow by hand; ties; what cannot be cut."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.graph.stitch import graph_from_plan
from advmoe_deploy.export.graph.unfused import unfused_graph
from advmoe_deploy.export.graph.writer import write_model
from advmoe_deploy.export.partition.cut import Partition, partition
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.dispatch import run_experts
from advmoe_deploy.models.routing.routing import Routes, RoutingRule
from advmoe_deploy.runtime.onnxruntime.graph_runner import GraphRunner
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.specs import Weighting
from tests.families import spec_of

IMAGES = np.random.default_rng(0).random((9, 1, 8, 8), dtype=np.float32)
SHAPE = (1, 8, 8)


class Scale(nn.Module):
    """An expert: x times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Small(Classifier):
    """One layer of three experts on the flattened image, added to the image itself."""

    def __init__(self, top_k: int, weighting: Weighting, gate: nn.Module | None = None) -> None:
        super().__init__(spec_of("dense ViT"))
        self.rules = (RoutingRule("only", 3, top_k, weighting),)
        self.gate = gate or nn.Linear(64, 3)
        self.experts = nn.ModuleList(Scale(factor) for factor in (2.0, -1.0, 10.0))
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor, routes: Routes | None = None) -> Tensor:
        routes = routes or Routes()
        x = images.flatten(1)
        routing = routes.decide(self.rules[0], self.gate, x)
        y = run_experts(routing, x, list(self.experts), routes.execution)
        logits: Tensor = self.head(x + y)
        return logits


class Constant(nn.Module):
    """A gate with an opinion of its own about nothing."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : len(self.scores)] * 0.0 + self.scores


def answers(parts: Partition, folder: Path) -> list[Prediction]:
    """Return what the plan, all three graphs and ONNX's own evaluator answer."""
    plan, graphs = parts.plan, parts.graphs
    files = {segment.name: folder / f"{segment.name}.onnx" for segment in plan.segments}
    for name, file in files.items():
        write_model(graphs[name], file)
    graph, unfused = graph_from_plan(plan, graphs), unfused_graph(plan, graphs)
    gather = graph_from_plan(plan, graphs, "gather")
    results = []
    for runner in (
        PlanRunner(plan, files, SHAPE),
        GraphRunner(graph.SerializeToString(), SHAPE, routes=plan.routes),
        GraphRunner(gather.SerializeToString(), SHAPE, routes=plan.routes),
        GraphRunner(unfused.SerializeToString(), SHAPE, routes=plan.routes),
    ):
        with runner:
            results.append(runner.infer(IMAGES))
    logits, ids, weights = ReferenceEvaluator(graph).run(None, {"images": IMAGES})
    return [*results, Prediction(logits, {"only": ids}, {"only": weights})]


WEIGHTINGS = [
    (1, "one"),
    (1, "probability"),
    (2, "probability"),
    (2, "renormalised"),
    (3, "renormalised"),
]


@pytest.mark.parametrize(("top_k", "weighting"), WEIGHTINGS)
def test_all_lowerings_agree_with_torch(tmp_path: Path, top_k: int, weighting: Weighting) -> None:
    torch.manual_seed(1)
    model = Small(top_k, weighting).eval()
    with torch.inference_mode():
        routes = Routes()
        logits = model(torch.from_numpy(IMAGES), routes).numpy()
    taken = routes.taken["only"]
    for answer in answers(partition(model), tmp_path):
        np.testing.assert_allclose(answer.logits, logits, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(answer.expert_ids["only"], taken.expert_ids_NK.numpy())
        np.testing.assert_allclose(answer.weights["only"], taken.weights_NK.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("scores", "first", "second"),
    [((0, 0, 0), 0, 1), ((0, 1, 1), 1, 2), ((1, 0, 1), 0, 2), ((-1, 0, -1), 1, 0)],
)
@pytest.mark.parametrize("top_k", [1, 2])
def test_ties_go_to_the_lowest_index(
    tmp_path: Path, scores: tuple[float, ...], first: int, second: int, top_k: int
) -> None:
    gate = Constant(*map(float, scores))
    model = Small(top_k, "renormalised", gate).eval()
    for answer in answers(partition(model), tmp_path):
        expected = np.tile([first, second][:top_k], (len(IMAGES), 1))
        np.testing.assert_array_equal(answer.expert_ids["only"], expected)


def test_the_sum_by_hand(tmp_path: Path) -> None:
    model = Small(2, "renormalised", Constant(0.0, float(np.log(3)), -9.0)).eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.weight[0, 0] = 1  # the first logit is the first pixel of x + y
    x = IMAGES[:, 0, 0, 0]
    for answer in answers(partition(model), tmp_path):
        np.testing.assert_array_equal(answer.expert_ids["only"][0], [1, 0])
        np.testing.assert_allclose(answer.weights["only"][0], [0.75, 0.25], atol=1e-4)
        np.testing.assert_allclose(answer.logits[:, 0], x * (1 - 0.75 + 0.5), atol=1e-4)


def test_segments_are_named_by_what_they_are() -> None:
    plan = partition(Small(2, "probability").eval()).plan
    names = ["trunk-0", "trunk-1", *(f"only.expert-{e}" for e in range(3))]
    assert [segment.name for segment in plan.segments] == names
    assert [tensor.name for tensor in plan.segment("trunk-0").outputs] == [
        "trunk-0.flatten",
        "only.scores",
    ]
    assert plan.segment("only.expert-0").inputs[0].shape == ("R", 64)
    assert [tensor.name for tensor in plan.segment("trunk-1").outputs] == ["logits"]


class Peeking(Small):
    """Its experts see more than their rows."""

    def __init__(self, expert: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(1, "one")
        self.expert = expert

    def forward(self, images: Tensor, routes: Routes | None = None) -> Tensor:
        routes = routes or Routes()
        x = images.flatten(1)
        routing = routes.decide(self.rules[0], self.gate, x)
        experts = [lambda rows: self.expert(rows, images) for _ in range(3)]
        logits: Tensor = self.head(run_experts(routing, x, experts, routes.execution))
        return logits


@pytest.mark.parametrize(
    "expert",
    [
        lambda rows, images: rows + images.flatten(1),
        lambda rows, images: images.flatten(1),
        lambda rows, images: rows,
    ],
)
def test_an_expert_that_is_no_function_of_its_rows_is_refused(
    expert: Callable[[Tensor, Tensor], Tensor],
) -> None:
    with pytest.raises(CheckFailedError, match="an expert of only reads something else"):
        partition(Peeking(expert).eval())

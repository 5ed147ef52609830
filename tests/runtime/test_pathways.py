"""Routing and pathways apart give what the runner gives, whatever meets at a pathway."""

import numpy as np
import pytest
from numpy.typing import NDArray

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.runtime.pathways import Rows, Work, joined_rows, work_of
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.runtime.routing import Tensors
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.select import open_runner
from tests.families import Families

IMAGES = to_float(load_dataset("digits").test.images[:24])


def assert_same(work: Work, runner: Runner) -> None:
    """Route two halves, let rows of both meet at their pathways, and compare with the runner."""
    expected, halves = runner.infer(IMAGES), [work.route(IMAGES[:7]), work.route(IMAGES[7:])]
    pathways = np.concatenate([pathways for pathways, _ in halves])
    rows = joined_rows([rows for _, rows in halves])
    for pathway in np.unique(pathways):
        own = np.flatnonzero(pathways == pathway)
        own = own[: work.count(len(own))]
        answer = work.run(int(pathway), rows[own])
        np.testing.assert_allclose(answer.logits, expected.logits[own], rtol=1e-4, atol=1e-5)
        for layer, ids in expected.expert_ids.items():
            np.testing.assert_array_equal(answer.expert_ids[layer], ids[own])
            np.testing.assert_allclose(answer.weights[layer], expected.weights[layer][own])


def test_rows_of_two_batches_meet_in_the_pathway_they_share(tiny_bundle: Bundle) -> None:
    with open_runner(tiny_bundle, "onnxruntime-plan") as runner:
        work = work_of(runner)
        assert work.pathways == 2
        pathways, _ = work.route(IMAGES)
        np.testing.assert_array_equal(pathways, runner.infer(IMAGES).expert_ids["router"][:, 0])
        assert {*pathways} == {0, 1}
        assert_same(work, runner)


def test_weights_of_whole_networks_are_applied(families: Families) -> None:
    with open_runner(families["expert networks"][1], "onnxruntime-plan") as runner:
        work = work_of(runner)
        assert work.pathways == 2
        assert_same(work, runner)


def test_a_graph_that_routes_inside_is_one_pathway(tiny_bundle: Bundle) -> None:
    with open_runner(tiny_bundle) as runner:
        work = work_of(runner)
        assert (work.pathways, work.count(63)) == (1, 63)
        pathways, rows = work.route(IMAGES)
        assert not pathways.any()
        answer, expected = work.run(0, rows[4:9]), runner.infer(IMAGES[4:9])
        np.testing.assert_array_equal(answer.logits, expected.logits)
        np.testing.assert_array_equal(answer.expert_ids["router"], expected.expert_ids["router"])


@pytest.mark.parametrize("engine", ["openvino", "openvino-plan"])
def test_an_engine_that_compiles_for_sizes_meets_few_of_them(
    tiny_bundle: Bundle, engine: str
) -> None:
    with open_runner(tiny_bundle, engine) as runner:
        work = work_of(runner)
        assert [work.count(n) for n in (1, 3, 5, 6, 17, 23, 64, 200)] == [
            1,
            3,
            4,
            6,
            16,
            23,
            64,
            64,
        ]
        assert_same(work, runner)


def test_routing_meets_few_sizes_as_well(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_runner(tiny_bundle, "openvino-plan") as runner:
        assert isinstance(runner, PlanRunner)
        work = work_of(runner)
        sizes: list[int] = []
        before_last = runner.before_last

        def counted(images: NDArray[np.float32]) -> Tensors:
            sizes.append(len(images))
            return before_last(images)

        monkeypatch.setattr(runner, "before_last", counted)
        images = np.concatenate([IMAGES] * 3)[:70]
        pathways, rows = work.route(images)
        assert sizes == [64, 8]
        assert rows.tensors["router.margins"].shape == (70,)
        assert len(pathways) == len(rows.tensors["router.weights"]) == 70
        np.testing.assert_array_equal(pathways, runner.infer(images).expert_ids["router"][:, 0])


def test_rows_keep_their_tensors_together() -> None:
    rows = Rows({"a": np.arange(4), "b": np.arange(4) * 10})
    both = joined_rows([rows[1:2], rows[np.array([3, 0])]])
    assert both.tensors["a"].tolist() == [1, 3, 0]
    assert both.tensors["b"].tolist() == [10, 30, 0]

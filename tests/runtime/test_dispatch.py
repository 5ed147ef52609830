"""Which rows go where, by hand."""

import numpy as np
import pytest

from advmoe_deploy.errors import UsageError
from advmoe_deploy.plan import ExpertsStep, RouteStep
from advmoe_deploy.runtime.dispatch import combined, dispatch
from advmoe_deploy.runtime.tensorrt.rows import (
    bucket,
    fitting_batch,
    is_read_later,
    padded,
    region_rows,
    rows_per_image,
)
from tests.families import Families


def test_each_expert_gets_its_rows_in_order() -> None:
    given = dispatch(np.array([[2], [0], [2], [2], [0]]))
    rows = {expert: list(numbers) for expert, numbers in given.rows()}
    assert rows == {0: [1, 4], 2: [0, 2, 3]}
    assert given.only is None
    assert list(given.positions({0: 0, 2: 10})) == [10, 0, 11, 12, 1]


def test_a_row_goes_to_two_experts() -> None:
    given = dispatch(np.array([[1, 0], [1, 2]]))
    assert {expert: list(numbers) for expert, numbers in given.rows()} == {
        0: [0],
        1: [0, 1],
        2: [1],
    }
    assert list(given.positions({0: 0, 1: 5, 2: 9})) == [5, 0, 6, 9]


def test_tokens_are_rows_of_their_own() -> None:
    given = dispatch(np.array([[[0], [1]], [[1], [1]]]))  # two images of two tokens
    assert {expert: list(numbers) for expert, numbers in given.rows()} == {0: [0], 1: [1, 2, 3]}


def test_one_expert_takes_all() -> None:
    assert dispatch(np.array([[3], [3]])).only == 3
    assert dispatch(np.array([[3, 1]])).only is None


def test_answers_come_back_in_order_and_weighted() -> None:
    ids = np.array([[1, 0], [0, 1]])
    parts = {0: np.array([[1.0], [2.0]], np.float32), 1: np.array([[10.0], [20.0]], np.float32)}
    weights = np.array([[0.5, 1.0], [2.0, 0.1]], np.float32)
    step = RouteStep(
        layer="l", scores="s", num_experts=2, top_k=2, weighting="probability", tokens=None
    )
    answer = combined(step, dispatch(ids), parts, weights)
    np.testing.assert_allclose(answer, [[0.5 * 10 + 1 * 1], [2 * 2 + 0.1 * 20]], rtol=1e-6)
    one = RouteStep(layer="l", scores="s", num_experts=2)
    first = {expert: rows[:1] for expert, rows in parts.items()}
    swapped = combined(one, dispatch(np.array([[1], [0]])), first, np.ones((2, 1), np.float32))
    np.testing.assert_array_equal(swapped, [[10], [1]])


def test_buckets_are_few_and_at_most_an_eighth_larger() -> None:
    sizes = [bucket(rows, 1024) for rows in range(1, 1025)]
    assert sizes == sorted(sizes)
    assert all(rows <= size <= rows * 9 / 8 for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 64
    assert [bucket(rows, 1024) for rows in (1, 16, 17, 100, 128, 129)] == [1, 16, 18, 104, 128, 144]
    assert bucket(97, 100) == 100  # never more than there is room for


@pytest.mark.parametrize("values", [1, 10, 32, 100, 3 * 32 * 32])
def test_regions_start_aligned(values: int) -> None:
    for rows in (1, 7, 64, 100):
        region = region_rows(rows, values)
        assert region >= rows
        assert region * values * 2 % 256 == 0
        assert region - rows < 128


def test_padding_names_the_first_row() -> None:
    assert list(padded(np.array([4, 2]), 4)) == [4, 2, 0, 0]


def test_batches_are_padded_together() -> None:
    one, tokens = {"images": 100}, {"tokens": 160}
    assert fitting_batch({"images": 17}, {"images": 1}, one) == (17, 18)
    assert fitting_batch({"images": 97}, {"images": 1}, one) == (97, 100)
    assert fitting_batch({"images": 3}, {"images": 8}, one) == (3, 8)
    both = {**one, **tokens}
    assert fitting_batch({"images": 9, "tokens": 144}, dict.fromkeys(both, 1), both) == (9, 9)
    assert fitting_batch({"images": 3, "tokens": 7}, dict.fromkeys(both, 1), both) == (1, 1)
    for rows in (0, 101):
        with pytest.raises(UsageError, match=rf"images has {rows} rows.*built for 1 to 100"):
            fitting_batch({"images": rows}, {"images": 1}, one)


@pytest.mark.parametrize(
    "family", ["conv experts", "token experts", "wide ResNet", "dual model", "dense ViT"]
)
def test_what_families_need(families: Families, family: str) -> None:
    plan = families[family][1].manifest.plan
    layers = [step for step in plan.steps if isinstance(step, ExpertsStep)]
    # Answers go on wherever a trunk follows.
    assert [is_read_later(plan, step.output) for step in layers] == [
        step.output not in plan.outputs for step in layers
    ]
    assert {rows_per_image(plan, step.input) for step in layers} <= {1, 4}

"""The router's kernel for GPUs, run by Triton's interpreter on the CPU."""

import os

import numpy as np
import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernel is defined
pytest.importorskip("triton", reason="Triton is not installed")

import torch

from advmoe_deploy.export.router_triton import route_rows
from advmoe_deploy.plan import RouteStep
from advmoe_deploy.runtime.plan_runner import route
from advmoe_deploy.specs import Weighting


@pytest.mark.parametrize(
    ("weighting", "rows", "experts", "top_k"),
    [
        ("one", 1, 2, 1),
        ("one", 33, 5, 1),
        ("probability", 1, 2, 1),
        ("probability", 70, 8, 3),
        ("renormalised", 33, 5, 2),
        ("renormalised", 70, 8, 8),
    ],
)
def test_the_kernel_follows_the_rule(
    weighting: Weighting, rows: int, experts: int, top_k: int
) -> None:
    scores = np.random.default_rng(rows).normal(0, 3, (rows, experts)).astype(np.float32)
    step = RouteStep(layer="l", scores="s", num_experts=experts, top_k=top_k, weighting=weighting)
    expected = route(step, scores)
    ids, weights = route_rows(torch.from_numpy(scores), top_k, weighting)
    assert ids.dtype == torch.int32
    np.testing.assert_array_equal(ids.numpy(), expected["l.expert_ids"])
    np.testing.assert_allclose(weights.numpy(), expected["l.weights"], rtol=2e-6)


def test_ties_go_to_the_lowest_index() -> None:
    scores = torch.tensor([[0.0, 1, 1, 1], [2, 2, 2, 2], [0, 0, 5, 0]])
    ids, weights = route_rows(scores, 2, "probability")
    assert ids.tolist() == [[1, 2], [0, 1], [2, 0]]
    np.testing.assert_allclose(weights[1].numpy(), [0.25, 0.25])

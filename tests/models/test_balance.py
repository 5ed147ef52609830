"""Balancing losses: values by hand, what they push towards, and a gate that has collapsed."""

import math

import pytest
import torch
from torch import Tensor

from advmoe_deploy.models.routing.balance import BALANCE_LOSSES
from advmoe_deploy.models.routing.capacity import Adjust, NoisyRouting
from advmoe_deploy.models.routing.routing import Routing, RoutingRule, choose
from tests.models.random_numbers import seeded


def routing_of(scores_NE: Tensor, top_k: int = 1) -> Routing:
    weighting = "one" if top_k == 1 else "renormalised"
    rule = RoutingRule("gate", scores_NE.shape[1], top_k, weighting)  # type: ignore[arg-type]
    return choose(scores_NE, rule, "probability")


def from_probabilities(*rows: list[float]) -> Routing:
    return routing_of(torch.tensor(rows, dtype=torch.float64).log())


def entropy(*p: float) -> float:
    return -sum(x * math.log(x) for x in p)


# Of these two rows both prefer expert 0; the mean probabilities are 3/4 and 1/4.
LOPSIDED = from_probabilities([0.9, 0.1], [0.6, 0.4])
LOPSIDED_STD = math.sqrt(2) * 0.15  # of 0.9 and 0.6 about 0.75, n - 1 in the divisor


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("switch", 2 * (1.0 * 0.75 + 0.0 * 0.25) - 1),
        ("column-entropy", -entropy(0.75, 0.25)),
        ("entropy", (entropy(0.9, 0.1) + entropy(0.6, 0.4)) / 2 - entropy(0.75, 0.25)),
        ("variance", 0.5 + 1 - LOPSIDED_STD),
        ("importance", ((1.5 - 1) ** 2 + (0.5 - 1) ** 2) / 2 / 1.0**2),
    ],
)
def test_values_by_hand(name: str, expected: float) -> None:
    assert float(BALANCE_LOSSES[name](LOPSIDED)) == pytest.approx(expected, abs=1e-12)


def test_load_by_hand() -> None:
    # Noise of deviation 1/2; the best score reaches itself half of the time, the other, which is
    # 1/2 below, with probability Phi(-1) = 0.158655.
    load = BALANCE_LOSSES["load"](routing_of(torch.tensor([[0.5, 0.0]], dtype=torch.float64)))
    a, b = 0.5, 0.15865525
    mean = (a + b) / 2
    assert float(load) == pytest.approx(((a - mean) ** 2 + (b - mean) ** 2) / 2 / mean**2)
    # Of two chosen the second-best is the bar: the best reaches it with probability Phi(1).
    two = BALANCE_LOSSES["load"](routing_of(torch.tensor([[0.5, 0.0]], dtype=torch.float64), 2))
    a, b = 1 - b, 0.5
    mean = (a + b) / 2
    assert float(two) == pytest.approx(((a - mean) ** 2 + (b - mean) ** 2) / 2 / mean**2)


def test_load_asks_whether_fresh_noise_would_reach_the_noisy_bar() -> None:
    clean, noisy = torch.tensor([[0.0, 0.2]]), torch.tensor([[0.3, 0.1]])
    chosen = choose(noisy, RoutingRule("gate", 2))
    routing = NoisyRouting(noisy, chosen.expert_ids_NK, chosen.weights_NK, clean, 0.1)
    p = [0.5 * math.erfc(z / math.sqrt(2)) for z in (3.0, 1.0)]  # 0.3 and 0.1 below 0.3
    mean = sum(p) / 2
    expected = sum((x - mean) ** 2 for x in p) / 2 / mean**2
    assert float(BALANCE_LOSSES["load"](routing)) == pytest.approx(expected, rel=1e-5)
    importance = BALANCE_LOSSES["importance"]
    assert importance(routing) == importance(routing_of(clean)), "importance is of clean scores"


def test_importance_load_is_the_mean_of_both() -> None:
    both = BALANCE_LOSSES["importance"](LOPSIDED) + BALANCE_LOSSES["load"](LOPSIDED)
    torch.testing.assert_close(BALANCE_LOSSES["importance-load"](LOPSIDED), both / 2)


@pytest.mark.parametrize("name", BALANCE_LOSSES)
def test_the_best_value_is_where_experts_share_alike(name: str) -> None:
    sure = 30 * torch.eye(4, dtype=torch.float64).repeat(3, 1)
    best = {"entropy": -math.log(4), "column-entropy": -math.log(4), "variance": None}.get(name, 0)
    value = float(BALANCE_LOSSES[name](routing_of(sure)))
    if best is not None:
        assert value == pytest.approx(best, abs=1e-9)
    collapsed = 30 * torch.eye(4, dtype=torch.float64)[:1].repeat(12, 1)
    assert float(BALANCE_LOSSES[name](routing_of(collapsed))) > value + 0.5


@pytest.mark.parametrize("name", BALANCE_LOSSES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_step_down_takes_from_the_favourite(name: str, top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    scores = (scores + torch.tensor([1.5, 0.0, 0.0, -1.5])).requires_grad_(True)
    loss = BALANCE_LOSSES[name](routing_of(scores, top_k))
    (gradient,) = torch.autograd.grad(loss, scores)
    push_E = -gradient.sum(dim=0)
    assert push_E[0] < 0, "the favourite's scores fall"
    if (name, top_k) != ("load", 2):  # there the bar that others must reach is often its own score
        assert push_E[3] > 0, "the neglected expert's rise"
    stepped = scores - gradient / gradient.abs().max() * 0.1
    assert BALANCE_LOSSES[name](routing_of(stepped, top_k)) < loss


@pytest.mark.parametrize("name", BALANCE_LOSSES)
@pytest.mark.parametrize("gap", [0.0, 100.0, 1e6])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_however_far_the_gate_has_collapsed(
    name: str, gap: float, rows: int, dtype: torch.dtype
) -> None:
    scores = torch.zeros(rows, 4, dtype=dtype)
    scores[:, 0] = gap
    scores.requires_grad_(True)
    adjust = Adjust(noise=0.1, normal=seeded(0))
    for routing in (routing_of(scores), adjust(RoutingRule("gate", 4), scores, "probability")):
        loss = BALANCE_LOSSES[name](routing)
        (gradient,) = torch.autograd.grad(loss, scores)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()

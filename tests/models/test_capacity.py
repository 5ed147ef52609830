"""Noise and capacity: rows by hand, and what must hold for any scores."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.routing.capacity import Adjust, NoisyRouting, Overflow, reassigned
from advmoe_deploy.models.routing.routing import Routes, Routing, RoutingRule, choose
from advmoe_deploy.specs import Weighting
from tests.models.random_numbers import seeded


def rule_of(num_experts: int, top_k: int) -> RoutingRule:
    weighting: Weighting = "one" if top_k == 1 else "renormalised"
    return RoutingRule("gate", num_experts, top_k, weighting)


def scores_of(rows: int, experts: int, *, seed: int = 0, skew: float = 0.0) -> Tensor:
    """Random scores; ``skew`` makes all rows prefer the first experts."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, experts, generator=generator, dtype=torch.float64)
    return noise - skew * torch.arange(experts)


def one_by_one(scores_NE: Tensor, top_k: int, capacity: int) -> list[list[int]] | None:
    """What the words say: each row in turn takes its best experts with room; None at a dead end."""
    room = [capacity] * scores_NE.shape[1]
    ids = []
    for row in scores_NE.tolist():
        ranked = sorted(range(len(row)), key=lambda e: -row[e])
        chosen = [e for e in ranked if room[e] > 0][:top_k]
        if len(chosen) < top_k:
            return None
        for e in chosen:
            room[e] -= 1
        ids.append(chosen)
    return ids


def test_overflow_goes_to_the_next_best_expert_with_room() -> None:
    # Three rows want expert 0, which has room for two; the third prefers 2 to 1.
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 1.0, 2.0]])
    assert reassigned(scores, 1, 2).tolist() == [[0], [0], [2]]


@pytest.mark.parametrize("overflow", ["reassign", "drop"])
def test_a_dropped_expert_has_no_room_and_no_share(overflow: Overflow) -> None:
    """Six rows, all for expert 0, of the two that are kept: three each."""
    rule = RoutingRule("gate", 3, 1, "one", dropped=(1,))
    scores = rule.masked(torch.tensor([[3.0, 2.0, 1.0]]).repeat(6, 1))
    routing = Adjust(capacity_factor=1.0, overflow=overflow)(rule, scores, None)
    if overflow == "reassign":
        assert routing.expert_ids_NK.flatten().tolist() == [0, 0, 0, 2, 2, 2]
    else:
        assert routing.weights_NK.flatten().tolist() == [1, 1, 1, 0, 0, 0]


def test_the_surest_rows_are_served_first_if_so_asked() -> None:
    scores = torch.tensor([[1.0, 0.0], [5.0, 0.0]])
    rule = rule_of(2, 1)
    assert Adjust(capacity_factor=1.0)(rule, scores, None).expert_ids_NK.tolist() == [[0], [1]]
    prioritised = Adjust(capacity_factor=1.0, prioritised=True)
    assert prioritised(rule, scores, None).expert_ids_NK.tolist() == [[1], [0]]


def test_dropping_serves_first_choices_first() -> None:
    # Two rows, two experts, each wants both; room for one each: the second choices find none.
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    routing = Adjust(capacity_factor=0.5, overflow="drop")(rule_of(2, 2), scores, None)
    assert routing.expert_ids_NK.tolist() == [[0, 1], [1, 0]]
    assert (routing.weights_NK > 0).tolist() == [[True, False], [True, False]]
    kept = choose(scores, rule_of(2, 2)).weights_NK
    torch.testing.assert_close(routing.weights_NK[:, 0], kept[:, 0])


def test_dropping_can_leave_a_row_without_any_expert() -> None:
    scores = torch.tensor([[2.0, 0.0]] * 4)
    routing = Adjust(capacity_factor=1.0, overflow="drop")(rule_of(2, 1), scores, None)
    assert routing.weights_NK.flatten().tolist() == [1.0, 1.0, 0.0, 0.0]


def test_a_row_makes_way_only_if_those_after_it_would_find_too_few_experts() -> None:
    # Each wants experts 0 and 1, each expert takes two rows. Were both of the first two to have
    # their wish, only expert 2 would be left to the third, which needs two different ones.
    scores = torch.tensor([[3.0, 2.0, 1.0]] * 3)
    assert one_by_one(scores, 2, 2) is None
    assert reassigned(scores, 2, 2).tolist() == [[0, 1], [0, 2], [1, 2]]
    # Three of five each: after the first row the second may have two of its wishes, not all three.
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]] * 3)
    assert reassigned(scores, 3, 2).tolist() == [[0, 1, 2], [0, 1, 3], [2, 3, 4]]


@pytest.mark.parametrize(
    ("num_experts", "top_k"),
    [(e, k) for e in (2, 3, 4, 5, 8, 16, 32) for k in (1, 2, 3, 4) if k <= e],
)
@pytest.mark.parametrize("factor", [1.0, 1.25, 2.0])
@pytest.mark.parametrize("skew", [0.0, 0.3, 3.0])
def test_reassignment_holds_for_any_scores(
    num_experts: int, top_k: int, factor: float, skew: float
) -> None:
    for rows, prioritised in product((1, 5, 64, 250), (False, True)):
        scores = scores_of(rows, num_experts, seed=rows, skew=skew)
        adjust = Adjust(capacity_factor=factor, prioritised=prioritised)
        routing = adjust(rule_of(num_experts, top_k), scores, None)
        capacity = math.ceil(factor * rows * top_k / num_experts)
        assert routing.expert_load_E.max() <= capacity
        assert routing.expert_load_E.sum() == rows * top_k
        assert all(len(set(ids)) == top_k for ids in routing.expert_ids_NK.tolist())
        if not prioritised:
            check_against_the_words(scores, top_k, min(capacity, rows), routing)


def check_against_the_words(scores: Tensor, top_k: int, capacity: int, routing: Routing) -> None:
    natural = choose(scores, rule_of(scores.shape[1], top_k))
    if natural.expert_load_E.max() <= capacity:
        assert routing.expert_ids_NK.tolist() == natural.expert_ids_NK.tolist()
    in_words = one_by_one(scores, top_k, capacity)
    if in_words is not None:
        assert routing.expert_ids_NK.tolist() == in_words
    else:
        assert top_k > 1, "with one expert per row there is never a dead end"


@pytest.mark.parametrize("num_experts", [2, 8, 32])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("prioritised", [False, True])
def test_dropping_holds_for_any_scores(num_experts: int, top_k: int, prioritised: bool) -> None:
    scores = scores_of(200, num_experts, skew=0.5)
    rule = rule_of(num_experts, top_k)
    adjust = Adjust(capacity_factor=1.05, overflow="drop", prioritised=prioritised)
    routing = adjust(rule, scores, None)
    natural = choose(scores, rule)
    kept = routing.weights_NK > 0
    load = torch.bincount(routing.expert_ids_NK[kept], minlength=num_experts)
    capacity = math.ceil(1.05 * 200 * top_k / num_experts)
    assert routing.expert_ids_NK.tolist() == natural.expert_ids_NK.tolist()
    # No expert is over capacity, and none that dropped a row had room for it.
    assert load.tolist() == natural.expert_load_E.clamp(max=capacity).tolist()
    torch.testing.assert_close(routing.weights_NK[kept], natural.weights_NK[kept])


def test_without_slack_every_expert_is_filled() -> None:
    scores = scores_of(128 * 64, 32, skew=1.0).float()
    routing = Adjust(capacity_factor=1.0)(rule_of(32, 2), scores, None)
    assert routing.expert_load_E.tolist() == [512] * 32


def test_noise_is_seeded_and_what_was_before_it_is_kept() -> None:
    scores = scores_of(1000, 4)
    rule = rule_of(4, 2)

    def noisy(seed: int) -> Routing:
        adjust = Adjust(noise=0.5, normal=seeded(seed))
        return adjust(rule, scores, None)

    first, again, other = noisy(1), noisy(1), noisy(2)
    assert isinstance(first, NoisyRouting)
    assert first.expert_ids_NK.tolist() == again.expert_ids_NK.tolist()
    assert first.expert_ids_NK.tolist() != other.expert_ids_NK.tolist()
    torch.testing.assert_close(first.clean_NE, scores)
    added = first.scores_NE - scores
    assert abs(float(added.mean())) < 0.05
    assert abs(float(added.std()) - 0.5) < 0.05
    torch.testing.assert_close(
        first.expert_ids_NK, first.scores_NE.topk(2, dim=1).indices, rtol=0, atol=0
    )


def test_an_adjusted_choice_keeps_the_gradient_of_its_weights() -> None:
    scores = scores_of(16, 4).requires_grad_(True)
    for overflow in ("reassign", "drop"):
        adjust = Adjust(
            noise=0.1,
            capacity_factor=1.0,
            overflow=overflow,  # type: ignore[arg-type]
            normal=seeded(0),
        )
        routes = Routes(surrogate="probability", adjust=adjust)
        routing = routes.decide(rule_of(4, 1), lambda x: x, scores)
        (gradient,) = torch.autograd.grad(routing.weights_NK.sum(), scores)
        dropped = routing.weights_NK[:, 0] == 0
        assert bool(dropped.any()) == (overflow == "drop")
        assert gradient[~dropped].abs().amax(dim=1).min() > 0
        assert not gradient[dropped].any()


@pytest.mark.parametrize(
    ("noise", "factor", "overflow"),
    [
        (-0.1, None, "reassign"),
        (math.nan, None, "reassign"),
        (0.0, 0.9, "reassign"),
        (0.0, 0.0, "drop"),
        (0.0, math.inf, "drop"),
    ],
)
def test_nonsense_is_refused(noise: float, factor: float | None, overflow: Overflow) -> None:
    with pytest.raises(UsageError):
        Adjust(noise=noise, capacity_factor=factor, overflow=overflow)

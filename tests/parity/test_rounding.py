"""What float32 leaves uncertain, on this processor and on any."""

import numpy as np
import torch
from torch import nn

from advmoe_deploy.export.partition.sample import Sample
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.parity.answers import Answers, RouteAnswers, first_images
from advmoe_deploy.parity.reference import Reference, Uncertainty
from advmoe_deploy.parity.rounding import disturb, disturbed, furthest
from tests.conftest import TINY

IMAGES = np.random.default_rng(0).random((20, 1, 8, 8), dtype=np.float32)


def test_a_weight_moves_by_the_rounding_of_its_sum() -> None:
    """A row of 1600 products: 100 roundings in a row in each of 16 sums, so ten on average."""
    rows, single = torch.ones(100, 1600), torch.ones(1600)
    moved = disturbed(rows, 0) - 1
    assert moved.dtype == torch.float64
    assert 9.8 < float(moved.std()) / 2**-24 < 10.2
    alone = disturbed(single, 0) - 1
    assert 0.9 < float(alone.std()) / 2**-24 < 1.1


def test_disturbing_is_the_same_every_time() -> None:
    one, other = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    other.load_state_dict(one.state_dict())
    before = one.weight.clone()
    for model in (one, other):
        disturb(model.parameters(), 1)
    assert torch.equal(one.weight, other.weight)
    assert not torch.equal(one.weight, before)
    assert not torch.equal(disturbed(before, 0), disturbed(before, 1))


def test_of_several_draws_the_furthest_counts_value_by_value() -> None:
    exact = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    one, other = exact + torch.tensor([[0.1, -0.2], [0.0, 0.3]]), exact - 0.15
    expected = torch.tensor([[0.85, 1.8], [2.85, 4.3]])
    torch.testing.assert_close(furthest([one, other], exact), expected)


def test_a_reference_is_as_it_was_after_it_was_disturbed() -> None:
    reference = Reference(untrained_model(TINY, torch.from_numpy(IMAGES)))
    first = reference.uncertainty(IMAGES)
    assert 0 < first.rounding < 1e-5
    assert first.scores > 0
    assert reference.uncertainty(IMAGES) == first
    assert reference.rounding(IMAGES) == first.rounding


def test_scores_that_cancel_are_uncertain_by_what_they_were_summed_from() -> None:
    """A bias far from zero, taken back from the images' side: scores near 0 of sums near 1000."""
    model = untrained_model(TINY, torch.from_numpy(IMAGES))
    before = Reference(model).uncertainty(IMAGES)
    with torch.no_grad():
        model.router.fc.weight.mul_(1000)
        model.router.fc.bias.sub_(model.score(torch.from_numpy(IMAGES)).mean(dim=0))
    after = Reference(model).uncertainty(IMAGES)
    assert after.scores > 100 * before.scores
    assert after.margin > before.margin


def test_routes_are_close_calls_where_rounding_may_swap_them() -> None:
    assert Uncertainty(0.0, scores=1e-6).margin == 1e-4
    assert Uncertainty(0.0, scores=1e-4).margin == 8e-4


def test_a_sample_is_as_uncertain_as_the_worse_of_two_roundings() -> None:
    exact = np.array([[1.0], [2.0]])
    sample = Sample({}, {"out": exact + 1e-6}, {"out": exact})
    assert abs(sample.rounding("out") - 1e-6) < 1e-12
    moved = Sample({}, sample.outputs, sample.exact, {"out": exact[:1] + 3e-6})
    assert abs(moved.rounding("out") - 3e-6) < 1e-12


def test_the_first_images_keep_their_tokens() -> None:
    scores, ids = np.arange(12.0).reshape(6, 2), np.arange(6)[:, None]  # two tokens an image
    answers = Answers(np.arange(3.0)[:, None], {"layer": RouteAnswers(scores, ids, ids)})
    first = first_images(answers, 2)
    assert first.logits.tolist() == [[0.0], [1.0]]
    assert first.routes["layer"].expert_ids.ravel().tolist() == [0, 1, 2, 3]

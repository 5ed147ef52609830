"""What training minimises and how it is paced, as sums a reader can do."""

import math

import numpy as np
import pytest
import torch

from advmoe_deploy.plan import effective_routes
from advmoe_deploy.train.data.schedule import epoch_batches, lr_factor
from advmoe_deploy.train.objectives.losses import class_routing_loss, trades


def test_trades_is_cross_entropy_plus_beta_times_kl() -> None:
    clean, adversarial = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    p, q = clean.softmax(1), adversarial.softmax(1)
    by_hand = -math.log(p[0, 0]) + 6 * float((p * (p / q).log()).sum())
    assert float(trades(clean, adversarial, torch.tensor([0]), 6)) == pytest.approx(by_hand)


def test_trades_survives_probabilities_that_underflow() -> None:
    clean = torch.tensor([[500.0, -500.0]], requires_grad=True)
    adversarial = torch.tensor([[-500.0, 500.0]], requires_grad=True)
    loss = trades(clean, adversarial, torch.tensor([0]), 6)
    gradients = torch.autograd.grad(loss, [clean, adversarial])
    assert all(torch.isfinite(t).all() for t in (loss, *gradients))


def test_class_routing_is_best_when_each_class_has_its_expert() -> None:
    split = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    collapsed = torch.tensor([[50.0, 0.0], [50.0, 0.0]])
    both = torch.tensor([0, 1])
    assert float(class_routing_loss(split, both, 2)) == pytest.approx(-math.log(2))
    assert float(class_routing_loss(collapsed, both, 2)) == pytest.approx(0, abs=1e-6)
    # A class that goes half here, half there tells nothing of its expert.
    assert float(class_routing_loss(split, torch.tensor([0, 0]), 2)) == pytest.approx(0, abs=1e-6)


def test_class_routing_has_a_gradient_where_a_batch_lacks_a_class() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    loss = class_routing_loss(scores, torch.tensor([0, 1]), num_classes=5)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 0] < 0
    assert gradient[1, 1] < 0


def test_effective_routes() -> None:
    assert effective_routes((5, 5)) == pytest.approx(2)
    assert effective_routes((10, 0)) == pytest.approx(1)
    assert effective_routes((3, 1)) == pytest.approx(4 / 3**0.75)


def test_schedules_start_and_end_where_they_should() -> None:
    assert [lr_factor("cosine", d) for d in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [lr_factor("one-cycle", d) for d in (0, 0.3, 1)] == pytest.approx([0.04, 1, 0])


def test_an_epoch_visits_every_image_once() -> None:
    batches = epoch_batches(10, 4, seed=1, epoch=0)
    assert [len(b) for b in batches] == [4, 3, 3]
    assert sorted(np.concatenate(batches)) == list(range(10))
    other = epoch_batches(10, 4, seed=1, epoch=1)
    assert not np.array_equal(np.concatenate(batches), np.concatenate(other))

"""What one step does to the weights, and what it refuses to do."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.errors import DivergedError
from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.train.data.loader import DataLoader
from advmoe_deploy.train.step.weights import TrainedWeights
from tests.toy_training import fabric, first_batch, some_digits, tiny


def moved(before: dict[str, Tensor], model: AdvMoE) -> set[str]:
    return {name.split(".")[0] for name, p in model.named_parameters() if (p != before[name]).any()}


def test_the_router_step_moves_the_router_and_the_expert_step_the_rest() -> None:
    config = tiny()
    learner = TrainedWeights(fabric(), config).learner
    assert isinstance(learner.model, AdvMoE)
    batch = first_batch(config)
    learner._set_lr(0.3)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    router, experts = learner.phases
    learner._update(router, batch, [None])
    assert moved(before, learner.model) == {"router"}
    middle = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner._update(experts, batch, [None])
    assert moved(middle, learner.model) == {"backbone"}


def test_images_too_many_for_the_device_come_batch_by_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny("digits-dense", "crop_padding=1", "flip=true")
    expected = first_batch(config).parts[0]
    monkeypatch.setattr("advmoe_deploy.data.pixels.IN_MEMORY_BYTES", 0)
    loader = DataLoader(fabric(), config, some_digits().train)
    # A device that holds no values: what is moved there is lost, what stays is not.
    loader._device = torch.device("meta")
    part = next(loader.epoch(0)).parts[0]
    assert part.images.device.type == "meta"
    assert loader._images.device.type == "cpu"
    loader._device = torch.device("cpu")
    assert torch.equal(next(loader.epoch(0)).parts[0].images, expected.images)


def test_a_step_leaves_no_gradient_and_training_mode() -> None:
    for name in ("digits-advmoe", "digits-at-moe", "digits-dense"):
        config = tiny(name)
        weights = TrainedWeights(fabric(), config)
        assert math.isfinite(weights.step(first_batch(config)))
        model = weights.learner.model
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert all(m.training for m in model.modules())


def test_balanced_start_makes_mean_scores_equal() -> None:
    config = tiny()
    learner = TrainedWeights(fabric(), config).learner
    assert isinstance(learner.model, AdvMoE)
    batch = first_batch(config)
    images = batch.parts[0].images
    before = {name: b.clone() for name, b in learner.model.named_buffers()}
    learner.balance_start(batch.parts[0])
    assert all(torch.equal(b, before[name]) for name, b in learner.model.named_buffers())
    mean_E = learner.model.score(images).mean(dim=0).detach()
    assert float(mean_E[0]) == pytest.approx(float(mean_E[1]), abs=1e-5)


def test_a_gradient_that_is_not_finite_is_named_and_not_applied() -> None:
    config = tiny()
    weights = TrainedWeights(fabric(), config)
    model = weights.learner.model
    batch = first_batch(config)
    with torch.no_grad():
        model.backbone.linear.weight.fill_(torch.nan)
    before = model.router.fc.weight.detach().clone()  # type: ignore[union-attr]
    with pytest.raises(DivergedError, match="the loss is not finite in the router step"):
        weights.step(batch)
    assert torch.equal(model.router.fc.weight, before)  # type: ignore[union-attr]


def test_a_weight_that_is_not_finite_is_named_at_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    weights = TrainedWeights(fabric(), config)
    optimizer = weights.learner.optimizers["experts"]
    step = optimizer.step

    def overflowing_step() -> None:
        step()
        weights.learner.model.backbone.linear.weight.data[0, 0] = torch.inf

    monkeypatch.setattr(optimizer, "step", overflowing_step)
    with pytest.raises(DivergedError, match=r"backbone.linear.weight holds 1 values"):
        weights.step(first_batch(config))


def test_the_average_follows_the_weights() -> None:
    config = tiny("digits-dense", "ema_decay=0.75")
    weights = TrainedWeights(fabric(), config)
    start = weights.learner.model.backbone.linear.weight.detach().clone()
    weights.step(first_batch(config))
    end = weights.learner.model.backbone.linear.weight.detach()
    averaged = weights.evaluated.backbone.linear.weight.detach()
    assert torch.allclose(averaged, 0.75 * start + 0.25 * end)
    assert F.mse_loss(start, end) > 0

"""Experts that agree: a shared start, random routes, stable scores, a router that steps less."""

from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from advmoe_deploy.data.dataset import Split
from advmoe_deploy.models.base import is_router_parameter
from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.models.routing.balance import even_shift
from advmoe_deploy.models.routing.routing import Routes
from advmoe_deploy.train.config import TrainConfig, apply_overrides, without_router
from advmoe_deploy.train.data.loader import Batch, DataLoader
from advmoe_deploy.train.objectives.adversarial import ascent_of
from advmoe_deploy.train.objectives.losses import divergence
from advmoe_deploy.train.objectives.router_terms import random_routes, score_terms
from advmoe_deploy.train.step.weights import TrainedWeights
from tests.toy_training import fabric, first_batch, some_digits, tiny

AGREEING = "digits-advmoe-agreeing"


def batches(config: TrainConfig, count: int, epoch: int = 0) -> list[Batch]:
    return list(islice(DataLoader(fabric(), config, some_digits().train).epoch(epoch), count))


def state(weights: TrainedWeights) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in weights.learner.model.state_dict().items()}


def test_shared_epochs_train_one_pathway_to_the_bit() -> None:
    config = tiny(AGREEING, "epochs=4", "shared_start=0.5", "ema_decay=0.9")
    alone = without_router(config, name="alone", model=config.model.pathway())
    shared, one = TrainedWeights(fabric(), config), TrainedWeights(fabric(), alone)
    for ours, theirs in zip(batches(config, 2), batches(alone, 2), strict=True):
        assert shared.step(ours) == one.step(theirs)
    mine, wanted = state(shared), state(one)
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)


def test_parted_experts_answer_as_the_one_before_and_then_differ() -> None:
    config = tiny(AGREEING, "epochs=4", "shared_start=0.5", "ema_decay=0.9")
    weights = TrainedWeights(fabric(), config)
    batch = first_batch(config)
    weights.step(batch)
    images = batch.parts[0].images
    one, averaged = weights.learner.model.eval(), weights.evaluated.eval()
    with torch.no_grad():
        before, average = one(images), averaged(images)
    weights.begin_epoch(2)
    weights.balance_start(batch)  # as a run does, and no average is lost by it
    model = weights.learner.model.eval()
    assert isinstance(model, AdvMoE)
    with torch.no_grad():
        for expert in range(2):
            forced = Routes(model.forced(expert).forced)
            torch.testing.assert_close(model(images, forced), before)
        torch.testing.assert_close(weights.evaluated.eval()(images), average)
    (bank,) = {name for name in state(weights) if name == "backbone.stages.0.0.conv1.weight"}
    model.train()
    for later in batches(config, 3, epoch=2):
        weights.step(later)
    first, second = model.get_parameter(bank).chunk(2)
    assert not torch.equal(first, second)


def test_momentum_goes_on_in_every_expert() -> None:
    config = tiny(AGREEING, "epochs=4", "shared_start=0.5")
    weights = TrainedWeights(fabric(), config)
    weights.step(first_batch(config))
    name = "momentum.backbone.stages.0.0.conv1.weight"
    before = weights.resume_tensors()[name]
    weights.begin_epoch(2)
    first, second = weights.resume_tensors()[name].chunk(2)
    assert torch.equal(first, before)
    assert torch.equal(second, before)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_random_routes_mix_every_class_and_stay_through_all_passes(share: float) -> None:
    config = tiny(AGREEING, "shared_start=0")
    model = TrainedWeights(fabric(), config).learner.model
    part = first_batch(config).parts[0]
    forced = random_routes(model, part, share)
    (routing,) = forced(part.images).values()
    (doubled,) = forced(torch.cat([part.images, part.images])).values()
    ids = routing.expert_ids_NK[:, 0]
    assert torch.equal(doubled.expert_ids_NK[:, 0], ids.repeat(2))
    assert set(ids.tolist()) == {0, 1}


def test_some_images_keep_their_route_where_only_a_share_is_random() -> None:
    config = tiny(AGREEING, "shared_start=0")
    model = TrainedWeights(fabric(), config).learner.model
    model.router.fc.bias.data[:] = torch.tensor([100.0, 0.0])  # type: ignore[union-attr,operator]
    images = torch.rand(512, *config.model.image_shape)
    part = DataLoader(
        fabric(),
        apply_overrides(config, ["batch_size=512"]),
        Split((images.numpy() * 255).astype(np.uint8), np.zeros(512, np.int64)),
    )
    (batch,) = part.epoch(0)
    (routing,) = random_routes(model, batch.parts[0], 0.5)(batch.parts[0].images).values()
    to_first = float((routing.expert_ids_NK == 0).float().mean())
    assert 0.65 < to_first < 0.85  # half as usual, and half of the other half by chance


@pytest.mark.parametrize(("experts", "rows"), [(2, 400), (2, 401), (3, 300), (5, 503), (4, 2)])
def test_an_even_shift_gives_every_expert_as_many_rows(experts: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(experts)
    scores = torch.randn(rows, experts, generator=generator) * torch.arange(1, experts + 1)
    shift = even_shift(scores + 3 * torch.arange(experts))
    load = (scores + 3 * torch.arange(experts) + shift).argmax(dim=1).bincount(minlength=experts)
    assert load.sum() == rows
    assert load.max() - load.min() <= max(1, rows // 50)


def test_loads_are_even_after_an_epoch_and_the_average_has_its_own_shift() -> None:
    config = tiny(AGREEING, "shared_start=0", "ema_decay=0.5")
    weights = TrainedWeights(fabric(), config)
    images = torch.cat([batch.parts[0].images for batch in batches(config, 2)])
    weights.learner.model.router.fc.bias.data[:] = torch.tensor([50.0, 0.0])  # type: ignore[union-attr,operator]
    weights.even_loads(images)
    for model in (weights.learner.model, weights.evaluated):
        load = model.eval().route(images)["router"].expert_load_E
        assert abs(int(load[0]) - int(load[1])) <= 1


def test_the_router_steps_on_one_of_so_many_batches() -> None:
    config = tiny(AGREEING, "shared_start=0", "router_every=2", "batch_size=16")
    weights = TrainedWeights(fabric(), config)
    moved = []
    for batch in batches(config, 3):
        before = state(weights)
        weights.step(batch)
        after = dict(weights.learner.model.named_parameters())
        router = [name for name in after if is_router_parameter(name)]
        moved.append(any(not torch.equal(after[name], before[name]) for name in router))
    assert moved == [True, False, True]


def test_the_term_of_stability_is_the_divergence_of_attacked_scores() -> None:
    config = tiny(AGREEING, "shared_start=0", "route_stability=6")
    model = TrainedWeights(fabric(), config).learner.model.eval()
    assert isinstance(model, AdvMoE)
    part = first_batch(config).parts[0]
    attacked = ascent_of(config).on_divergence(model.score, part)
    term = score_terms(config, model, part, attacked)
    with torch.no_grad():
        expected = divergence(model.score(part.images), model.score(attacked))
        term = term.detach()
    torch.testing.assert_close(term, 6 * expected)
    assert expected > 0

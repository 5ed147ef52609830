"""How examples are found, and what training does to precision, noise and routers."""

import math

import pytest
import torch
from torch import Tensor, nn

from advmoe_deploy.attacks.white_box import attack_model
from advmoe_deploy.models.routing.dispatch import frozen_parameters
from advmoe_deploy.models.routing.routing import Routes, RoutingRule, choose
from advmoe_deploy.specs import AttackSpec
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.data.rng import RandomNumbers
from advmoe_deploy.train.distributed.collectives import SynchronisedBatchNorm2d, synchronise
from advmoe_deploy.train.objectives.forward import ForwardPass
from advmoe_deploy.train.run.router_robustness import FlipProbe, router_state, with_router
from advmoe_deploy.train.step.loss_scale import LossScale
from advmoe_deploy.train.step.weights import TrainedWeights
from tests.toy_training import fabric, first_batch, tiny, tiny_of


def distance(config: TrainConfig) -> float:
    """Return how far, in epsilons, the examples of the first batch are from its images."""
    learner = TrainedWeights(fabric(), config).learner
    part = first_batch(config).parts[0]
    scene = learner._scene(learner.phases[0], part)
    examples = learner._find(learner.phases[0], scene)
    assert examples.min() >= 0
    assert examples.max() <= 1
    return float((examples - part.images).abs().max()) / config.threat.epsilon


def test_examples_stay_in_the_ball_except_n_fgsms() -> None:
    for loss in ("trades", "pgd-at", "fast", "free"):
        assert (
            0.5
            < distance(tiny_of("dense", "joint", f"loss={loss}", "attack_step_size=null"))
            <= 1 + 1e-5
        )
    assert distance(tiny_of("dense", "joint", "loss=standard")) == 0
    # Noise of up to k epsilon and a step of epsilon.
    assert (
        2 < distance(tiny_of("dense", "joint", "loss=n-fgsm", "attack_step_size=null")) <= 3 + 1e-5
    )
    assert (
        distance(tiny_of("dense", "joint", "loss=n-fgsm", "nfgsm_noise=0", "attack_step_size=null"))
        <= 1 + 1e-5
    )


def test_free_training_moves_the_images_by_the_gradient_that_trains() -> None:
    config = tiny_of("dense", "joint", "loss=free", "free_repeats=1", "attack_step_size=null")
    learner = TrainedWeights(fabric(), config).learner
    batch, phase = first_batch(config), learner.phases[0]
    images = batch.parts[0].images
    start = learner._find(phase, learner._scene(phase, batch.parts[0]))
    x = start.clone().requires_grad_(True)
    loss = nn.functional.cross_entropy(learner.model(x), batch.parts[0].labels)
    (gradient,) = torch.autograd.grad(loss, x)
    found: list[Tensor | None] = [start]
    learner._update(phase, batch, found)
    (moved,) = found
    assert moved is not None
    expected = (start + config.threat.epsilon * gradient.sign()).clamp(0, 1)
    low, high = images - config.threat.epsilon, images + config.threat.epsilon
    assert torch.allclose(moved, torch.minimum(torch.maximum(expected, low), high), atol=1e-6)


def test_routers_and_logits_keep_full_precision() -> None:
    config = tiny("digits-advmoe")
    model = TrainedWeights(fabric(), config).learner.model
    images = first_batch(config).parts[0].images
    run = ForwardPass(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    with torch.no_grad():
        model.eval()
        logits = run(images)
        exact = model.route(images)["router"].scores_NE
        rounded = Routes()
        with torch.autocast("cpu", torch.bfloat16):
            model(images, rounded)
    assert logits.dtype == torch.float32
    assert torch.equal(run.taken["router"].scores_NE, exact)
    assert not torch.equal(rounded.taken["router"].scores_NE.float(), exact)


def test_a_draw_is_cut_out_of_the_draw_for_all() -> None:
    """Two processes, two tokens per image, clean and attacked images one behind the other."""

    def rng(mine: slice) -> RandomNumbers:
        return RandomNumbers(torch.Generator().manual_seed(0), 5, mine)

    whole = rng(slice(None)).normal_scores(torch.zeros(20, 3), copies=2).view(2, 5, 2, 3)
    for rank, rows in ((0, 12), (1, 8)):
        own = rng(slice(rank, None, 2)).normal_scores(torch.zeros(rows, 3), copies=2)
        assert torch.equal(own.view(2, rows // 4, 2, 3), whole[:, rank::2])


def test_synchronised_batch_norm_of_one_process_is_torchs() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(3))
    shared = nn.Sequential(nn.BatchNorm2d(3))
    synchronise(shared)
    assert isinstance(shared[0], SynchronisedBatchNorm2d)
    for _ in range(2):
        x = (5 + torch.randn(4, 3, 2, 2)).requires_grad_(True)
        y, z = plain(x), shared(x)
        weight = torch.randn_like(x)
        (a,) = torch.autograd.grad((y * weight).sum(), x)
        (b,) = torch.autograd.grad((z * weight).sum(), x)
        assert torch.allclose(y, z, atol=1e-5)
        assert torch.allclose(a, b, atol=1e-5)
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(tensor, shared.state_dict()[name], atol=1e-6), name
    before = {name: t.clone() for name, t in shared.state_dict().items()}
    one = torch.ones(1, 3, 1, 1)
    assert torch.allclose(shared(one), shared.eval()(one))  # no variance: running statistics
    shared.train()(torch.ones(0, 3, 2, 2))
    assert all(torch.equal(t, before[name]) for name, t in shared.state_dict().items())


def test_the_loss_scale_halves_at_an_overflow_and_recovers() -> None:
    scale = LossScale(enabled=True)
    start = scale.factor
    assert scale.overflowed()
    assert scale.factor == start / 2
    for _ in range(1000):
        scale.fitted()
    assert scale.factor == start
    scale.fitted()
    again = LossScale(enabled=True)
    again.restore(scale.tensors())
    assert again.tensors()["loss_scale"].tolist() == [start, 1]
    while scale.factor > 1:
        assert scale.overflowed()
    assert not scale.overflowed()
    assert not LossScale(enabled=False).overflowed()
    assert LossScale(enabled=False).tensors() == {}


def test_a_scaled_loss_takes_the_same_step_and_leaves_out_an_overflow() -> None:
    config = tiny_of("dense", "joint", "loss=standard")
    ends = []
    for factor in (1.0, 2.0**10, 2.0**127):
        weights = TrainedWeights(fabric(), config)
        start = weights.learner.model.get_parameter("backbone.linear.weight").detach().clone()
        weights.learner.scale = LossScale(enabled=True)
        weights.learner.scale.factor = factor
        assert math.isfinite(weights.step(first_batch(config)))
        end = weights.learner.model.get_parameter("backbone.linear.weight").detach()
        ends.append(end - start)
    assert torch.allclose(ends[0], ends[1], atol=1e-7)
    assert not ends[2].any()
    assert weights.learner.scale.factor == 2.0**126


def test_flips_are_the_share_of_images_whose_best_expert_changes() -> None:
    config = tiny("digits-advmoe")
    weights = TrainedWeights(fabric(), config)
    weights.balance_start(first_batch(config))
    model, part = weights.learner.model, first_batch(config).parts[0]
    attack = AttackSpec(name="pgd", target="straight-through", steps=2)
    probe = FlipProbe(fabric(), part.images, part.labels, config.threat, attack)
    found = attack_model(model, part.images, part.labels, config.threat, attack)
    with torch.no_grad(), frozen_parameters(model):
        model.eval()
        routes = [model.route(x)["router"].expert_ids_NK for x in (part.images, found)]
        model.train()
    assert probe.flips(model) == pytest.approx(float((routes[0] != routes[1]).float().mean()))
    stubborn = router_state(model)
    stubborn["router.fc.bias"] = torch.tensor([1e6, 0.0])
    own = router_state(model)
    with with_router(model, stubborn):
        assert probe.flips(model) == 0
    assert all(torch.equal(t, own[name]) for name, t in router_state(model).items())


def test_the_average_starts_from_the_balanced_router() -> None:
    config = tiny("digits-advmoe", "ema_decay=0.9")
    weights = TrainedWeights(fabric(), config)
    weights.balance_start(first_batch(config))
    raw, averaged = weights.learner.model.state_dict(), weights.evaluated.state_dict()
    assert weights.evaluated is not weights.learner.model
    assert all(torch.equal(t, averaged[name]) for name, t in raw.items())


def test_released_router_learns_label_parity() -> None:
    config = tiny_of("advmoe", "advmoe-released", "beta=2")
    learner = TrainedWeights(fabric(), config).learner
    router, part = learner.phases[0], first_batch(config).parts[0]
    scene = learner._scene(router, part)
    loss = router.objective.loss(scene, part.images)  # no attack: its divergence is 0
    scores_NE = learner.model.score(torch.cat([part.images] * 2))[: len(part.images)]
    natural = nn.functional.cross_entropy(scores_NE, part.labels % 2)
    assert float(loss.detach()) == pytest.approx(2 * float(natural.detach()), rel=1e-5)
    rule = RoutingRule("router", 2)
    assert choose(scores_NE, rule, router.surrogate).weights_NK.requires_grad

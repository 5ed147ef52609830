"""PGD stays inside the threat model, does harm, and can be repeated."""

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from advmoe_deploy.attacks.clean_routes import CleanRoutes
from advmoe_deploy.attacks.pgd import eval_mode, pgd_kl, project, step_size_of
from advmoe_deploy.attacks.white_box import attack_model, predict
from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.specs import AttackSpec, AttackTarget, ThreatModel
from tests.attacks.digits import TARGETS, THREAT, accuracy, some_digits


@pytest.mark.parametrize("target", TARGETS)
def test_pgd_stays_inside_and_lowers_accuracy(model: AdvMoE, target: AttackTarget) -> None:
    x, y = some_digits(60)
    found = attack_model(model, x, y, THREAT, AttackSpec(name="pgd", steps=8, target=target))
    assert (found - x).abs().max() <= THREAT.epsilon + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    answers = predict(model, found, routes_of=x if target == "experts" else None)
    assert (answers == y).float().mean() < accuracy(model, x, y) - 0.1


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_seed_finds_the_same_examples(model: AdvMoE, target: AttackTarget) -> None:
    x, y = some_digits(10)
    attack = AttackSpec(name="pgd", steps=2, target=target, restarts=2, seed=5)
    first = attack_model(model, x, y, THREAT, attack)
    assert torch.equal(first, attack_model(model, x, y, THREAT, attack))
    other = attack_model(model, x, y, THREAT, attack.model_copy(update={"seed": 6}))
    assert not torch.equal(first, other)


def test_an_attack_leaves_the_model_as_it_was(model: AdvMoE) -> None:
    x, y = some_digits(8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.train()
    model.backbone.bn1.eval()
    try:
        attack_model(model, x, y, THREAT, AttackSpec(name="pgd", steps=1))
        assert model.training
        assert not model.backbone.bn1.training
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    finally:
        model.eval()


def test_settling_for_the_first_fools_as_many(model: AdvMoE) -> None:
    x, y = some_digits(60)
    attack = AttackSpec(name="pgd", steps=6)
    worst = attack_model(model, x, y, THREAT, attack)
    first = attack_model(model, x, y, THREAT, attack, first_only=True)
    assert accuracy(model, worst, y) == pytest.approx(accuracy(model, first, y), abs=0.04)


def test_a_clean_mistake_is_never_corrected(model: AdvMoE) -> None:
    x, _ = some_digits(30)
    wrong = (predict(model, x) + 1) % 10
    found = attack_model(model, x, wrong, THREAT, AttackSpec(name="pgd", steps=2))
    assert accuracy(model, found, wrong) == 0


class TwoHalves(nn.Module):
    """Logits (s, -s) with s the sum of the pixels less two: the best attack is known."""

    rules = ()
    shares_batch = False

    def forward(self, x: Tensor, routes: object = None) -> Tensor:
        s = x.sum(dim=(1, 2, 3)) - 2
        return torch.stack([s, -s], dim=1)


def test_pgd_reaches_the_corner_a_linear_model_wants() -> None:
    x = torch.full((1, 1, 2, 2), 0.6)  # sum 2.4: class 0; lowering each pixel by 0.15 flips it
    attack = AttackSpec(name="pgd", steps=5)
    fooled = attack_model(TwoHalves(), x, torch.tensor([0]), ThreatModel(epsilon=0.15), attack)  # type: ignore[arg-type]
    assert torch.allclose(fooled, torch.full_like(x, 0.45))


def test_without_a_random_start_the_seed_does_not_matter(model: AdvMoE) -> None:
    x, y = some_digits(10)
    one, other = (
        attack_model(
            model, x, y, THREAT, AttackSpec(name="pgd", steps=2, random_start=False, seed=seed)
        )
        for seed in (0, 1)
    )
    assert torch.equal(one, other)
    with pytest.raises(ValidationError, match="would all be the same"):
        AttackSpec(name="pgd", random_start=False, restarts=2)


def test_default_step_and_projection() -> None:
    assert step_size_of(AttackSpec(name="pgd", steps=10), THREAT) == pytest.approx(0.025)
    assert step_size_of(AttackSpec(name="pgd", step_size=0.3), THREAT) == 0.3
    x = torch.tensor([0.0, 0.5, 1.0])
    assert project(x + 0.2, x, 0.1).tolist() == pytest.approx([0.1, 0.6, 1.0])


def test_pgd_kl_raises_the_divergence_it_climbs(model: AdvMoE) -> None:
    x, _ = some_digits(20)

    def divergence(x_adv: Tensor) -> float:
        with torch.no_grad():
            p, q = model(x).log_softmax(1), model(x_adv).log_softmax(1)
        return float(nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))

    start = x + 0.001 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = pgd_kl(model, x, start, threat=THREAT, steps=3, step_size=0.05)
    assert (found - x).abs().max() <= THREAT.epsilon + 1e-6
    assert divergence(found) > 0.1


def test_eval_mode_gives_each_module_its_own_mode_back() -> None:
    pair = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1)).train()
    pair[1].eval()
    with eval_mode(pair):
        assert not pair[0].training
    assert pair[0].training
    assert not pair[1].training


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "router"])
def test_more_restarts_never_find_less(model: AdvMoE, target: AttackTarget) -> None:
    x, y = some_digits(60)
    losses = []
    for restarts in (1, 4):
        attack = AttackSpec(name="pgd", steps=3, target=target, restarts=restarts)
        found = attack_model(model, x, y, THREAT, attack)
        routes = CleanRoutes(model, x).of(torch.arange(60)) if target == "experts" else None
        with torch.no_grad():
            losses.append(nn.functional.cross_entropy(model(found, routes), y, reduction="none"))
    right_N = losses[1] < np.log(2)  # certainly right: such an image is still under attack
    assert right_N.any()
    assert (losses[1] >= losses[0] - 1e-6)[right_N].all()


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_that_answers_nan_is_not_called_robust(model: AdvMoE, target: AttackTarget) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.backbone.linear.bias[3] = torch.nan
    with pytest.raises(CheckFailedError, match="not finite under attack"):
        attack_model(broken, *some_digits(5), THREAT, AttackSpec(name="pgd", target=target))


@pytest.mark.parametrize("target", TARGETS)
def test_no_images_are_no_problem(model: AdvMoE, target: AttackTarget) -> None:
    x, y = some_digits(0)
    assert attack_model(model, x, y, THREAT, AttackSpec(name="pgd", target=target)).shape == x.shape
    assert predict(model, x).shape == (0,)

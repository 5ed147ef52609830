"""Another function is attacked by its own answers, through a model's gradients."""

import copy

import pytest
import torch
from torch import Tensor

from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.losses import is_wrong
from advmoe_deploy.attacks.white_box import attack_model
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.specs import AttackSpec, AttackTarget
from tests.attacks.digits import TARGETS, THREAT, accuracy, some_digits


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "experts"])
def test_another_function_is_attacked_by_its_own_answers(
    model: AdvMoE, target: AttackTarget
) -> None:
    x, y = some_digits(100)
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.05 * parameter.data.abs().mean() * noise
    attack = AttackSpec(name="pgd", steps=8, target=target)
    asked = []

    @torch.no_grad()
    def answer(images: Tensor) -> Tensor:
        asked.append(len(images))
        logits: Tensor = other(images)
        return logits

    transferred = attack_model(model, x, y, THREAT, attack)
    found = attack_model(model, x, y, THREAT, attack, answer=answer)
    assert asked
    assert (found - x).abs().max() <= THREAT.epsilon + 1e-6
    assert accuracy(other, found, y) <= accuracy(other, transferred, y)
    assert accuracy(model, found, y) >= accuracy(model, transferred, y)


@torch.no_grad()
def test_an_answer_that_is_not_finite_is_a_mistake(model: AdvMoE) -> None:
    x, y = some_digits(20)
    left, right = x[:, 0, :, :4].sum(dim=(1, 2)), x[:, 0, :, 4:].sum(dim=(1, 2))
    assert 0 < int((left > right).sum()) < len(x)

    def overflowing(images: Tensor) -> Tensor:
        logits: Tensor = model(images)
        heavy_N = images[:, 0, :, :4].sum(dim=(1, 2)) > images[:, 0, :, 4:].sum(dim=(1, 2))
        logits[heavy_N] = torch.inf
        return logits

    attack = AttackSpec(name="pgd", steps=4)
    found = attack_model(model, x, y, THREAT, attack, answer=overflowing)
    lost_N = is_wrong(overflowing(found), y)
    assert lost_N[left > right].all()  # wrong from the start, and so they stay
    assert (~torch.isfinite(overflowing(found)).all(dim=1)).any()


def test_what_cannot_attack_another_function_is_refused(model: AdvMoE) -> None:
    x, y = some_digits(4)
    for attack in (AttackSpec(name="pgd", target="experts"), AttackSpec(name="apgd")):
        with pytest.raises(UsageError, match=r"attack the model|use pgd"):
            find_adversarial(model, x, y, THREAT, attack, answer=model)

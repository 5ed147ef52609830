"""AutoAttack, its parts and the other attacks that are found by name."""

import copy
from typing import Literal

import numpy as np
import pytest
import torch

from advmoe_deploy.attacks import batches
from advmoe_deploy.attacks.autoattack import _lead_of_target
from advmoe_deploy.attacks.black_box import attack_predictions
from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.white_box import attack_model
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.specs import AttackSpec, ThreatModel
from tests.attacks.digits import THREAT, accuracy, some_digits
from tests.toys import LinearClassifier, toy_spec


@pytest.mark.parametrize("name", ["pgd", "apgd", "apgd-t", "fab-t", "square", "rays"])
def test_every_attack_is_found_by_name(model: AdvMoE, name: Literal["pgd", "apgd"]) -> None:
    x, y = some_digits(30)
    attack = AttackSpec(name=name, steps=20, seed=1)
    state = torch.random.get_rng_state()
    found = find_adversarial(model, x, y, THREAT, attack)
    assert torch.equal(state, torch.random.get_rng_state())
    assert (found - x).abs().max() <= THREAT.epsilon + 1e-6
    assert accuracy(model, found, y) < accuracy(model, x, y)
    assert torch.equal(found, find_adversarial(model, x, y, THREAT, attack))
    assert find_adversarial(model, x[:0], y[:0], THREAT, attack).shape == (0, 1, 8, 8)


def test_apgd_does_what_it_can_aim_at(model: AdvMoE) -> None:
    x, y = some_digits(20)
    for target in ("model", "straight-through"):
        attack = AttackSpec(name="apgd", steps=20, target=target)
        found = find_adversarial(model, x, y, THREAT, attack)
        pgd = attack_model(model, x, y, THREAT, AttackSpec(name="pgd", steps=20, target=target))
        assert accuracy(model, found, y) <= accuracy(model, pgd, y) + 0.1
    with pytest.raises(UsageError, match="cannot aim at target pathway"):
        find_adversarial(model, x, y, THREAT, AttackSpec(name="apgd", target="pathway"))


def test_square_attacks_anything_that_answers(model: AdvMoE) -> None:
    x, y = some_digits(40)

    def answer(images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.float32
        with torch.no_grad():
            return model(torch.from_numpy(images)).numpy()

    attack = AttackSpec(name="square", steps=60, seed=1)
    state = torch.random.get_rng_state()
    found = attack_predictions(answer, x.numpy(), y.numpy(), THREAT, attack)
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.abs(found - x.numpy()).max() <= THREAT.epsilon + 1e-6
    assert accuracy(model, torch.from_numpy(found), y) < accuracy(model, x, y)
    again = attack_predictions(answer, x.numpy(), y.numpy(), THREAT, attack)
    assert np.array_equal(found, again)


def test_square_goes_on_where_all_classes_tie(model: AdvMoE) -> None:
    x, y = some_digits(6)[0], torch.zeros(6, dtype=torch.int64)
    tied = copy.deepcopy(model)
    for parameter in tied.backbone.parameters():
        parameter.data.zero_()
    found = find_adversarial(tied, x, y, THREAT, AttackSpec(name="square", steps=5))
    assert torch.equal(found, x)  # the first class is the answer, whatever was tried


def test_autoattack_leaves_nothing_of_a_weak_model(model: AdvMoE) -> None:
    x, y = some_digits(6)
    wide = ThreatModel(epsilon=0.5)  # so that its first attack succeeds and the test is short
    found = find_adversarial(model, x, y, wide, AttackSpec(name="autoattack"))
    assert (found - x).abs().max() <= wide.epsilon + 1e-5
    assert accuracy(model, found, y) == 0


def test_autoattack_takes_fewer_large_images_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_BATCH_PIXELS", 0)  # so that any image is a large one
    model, asked = pixels(3), list[int]()
    x = torch.zeros(20, 1, 4, 4)
    x[:, 0, 0, 0] = 1.0
    y, wide = torch.zeros(20, dtype=torch.int64), ThreatModel(epsilon=0.6)
    with model.register_forward_hook(lambda _, given, __: asked.append(len(given[0]))):
        found = find_adversarial(model, x, y, wide, AttackSpec(name="autoattack"))
    assert max(asked) == 8
    assert accuracy(model, found, y) == 0


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_autoattack_knows_fewer_than_ten_classes(classes: int) -> None:
    model = pixels(classes)
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0] = 1.0
    # A ball of 0.2 leaves 0.8 against 0.2, whatever is tried; one of 0.6 leaves 0.4 against 0.6.
    for epsilon, right in ((0.2, 1), (0.6, 0)):
        threat, attack = ThreatModel(epsilon=epsilon), AttackSpec(name="autoattack")
        found = find_adversarial(model, x, torch.tensor([0]), threat, attack)
        assert accuracy(model, found, torch.tensor([0])) == right


def pixels(classes: int) -> LinearClassifier:
    """A model whose logits are the first pixels."""
    return LinearClassifier(toy_spec(classes), torch.eye(classes, 16), torch.zeros(classes))


def test_autoattacks_third_loss_is_the_targets_lead() -> None:
    class Attack:
        y_target = torch.tensor([2, 0])

    logits = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 0.0]])
    assert _lead_of_target(Attack(), logits, torch.tensor([0, 1])).tolist() == [-1.0, 1.0]

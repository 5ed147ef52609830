"""RayS asks for labels alone, and no more often than it may."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from advmoe_deploy.attacks.black_box import attack_predictions
from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.rays import rays
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.specs import AttackSpec
from advmoe_deploy.verify import verify as verify_module
from advmoe_deploy.verify.verify import verify_bundle
from tests.attacks.digits import THREAT, some_digits

GREY = torch.full((3, 1, 4, 4), 0.5)
ONES = torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1, 1, 1, -1, -1, 1, -1, 1, 1])


class Slope:
    """Answers otherwise once an image has gone far enough along a direction; counts questions.

    A label stands for its image: what has label i is turned at a radius of (i + 1) * 0.05.
    """

    def __init__(self, direction: Tensor = ONES, size: int = 3) -> None:
        self.direction, self.asked = direction, np.zeros(size, dtype=int)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        assert images.min() >= 0
        assert images.max() <= 1
        self.asked[labels.numpy()] += 1
        gone_N = ((images - 0.5).flatten(1) * self.direction).mean(dim=1)
        return gone_N > 0.05 * (labels + 1) - 1e-4


def test_the_direction_is_found_by_answers_alone() -> None:
    # Along those very signs the answers turn at 0.05, 0.1 and 0.15, and no sooner along others.
    found = rays(Slope(), GREY, torch.arange(3), epsilon=0.1, queries=400, seed=0)
    turned = (found != GREY).flatten(1).any(dim=1)
    assert turned.tolist() == [True, True, False]
    assert Slope()(found, torch.arange(3)).tolist() == [True, True, False]
    assert (found - GREY).abs().max() <= 0.1 + 1e-7


@pytest.mark.parametrize("queries", [1, 2, 7, 300])
def test_no_image_is_asked_about_more_often_than_allowed(queries: int) -> None:
    slope = Slope()
    rays(slope, GREY, torch.arange(3), epsilon=0.1, queries=queries, seed=0)
    assert slope.asked.max() == slope.asked[2] == queries  # none turns the last one within 0.1
    if queries == 300:
        assert slope.asked[0] < slope.asked[1] < queries


def test_what_is_wrong_already_is_asked_about_once() -> None:
    slope = Slope()
    wrong = GREY + 0.2 * ONES.view(1, 1, 4, 4)
    found = rays(slope, wrong, torch.arange(3), epsilon=0.1, queries=50, seed=0)
    assert torch.equal(found, wrong)
    assert slope.asked.tolist() == [1, 1, 1]


def test_images_do_not_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    slope = Slope(torch.randn(16, generator=generator), size=8)
    x = GREY[:1] + 0.1 * torch.rand(8, 1, 4, 4, generator=generator)
    labels = torch.arange(8) % 3
    whole = rays(slope, x, labels, epsilon=0.15, queries=200, seed=3)
    alone = [
        rays(slope, x[i : i + 1], labels[i : i + 1], epsilon=0.15, queries=200, seed=3)
        for i in range(8)
    ]
    assert torch.equal(whole, torch.cat(alone))
    assert not torch.equal(whole, x)


def test_it_begins_anew_where_no_block_helps() -> None:
    # No one block of equal signs sets both pairs of neighbours at odds.
    def fooled(images: Tensor, _: Tensor) -> Tensor:
        signs = (images - 0.5).flatten(1).sign()
        return (signs[:, 0] * signs[:, 1] < 0) & (signs[:, 2] * signs[:, 3] < 0)

    few = rays(fooled, GREY, torch.arange(3), epsilon=0.1, queries=33, seed=0)
    assert torch.equal(few, GREY)  # the paper's 31 blocks, each flipped alone
    many = rays(fooled, GREY, torch.arange(3), epsilon=0.1, queries=400, seed=0)
    assert fooled(many, torch.arange(3)).all()


def test_trained_digits_fall_to_labels_alone(trained_run: Path) -> None:
    _, model = load_checkpoint(trained_run / "model")
    x, y = some_digits(60)
    attack = AttackSpec(name="rays", steps=200)
    state = torch.random.get_rng_state()
    found = find_adversarial(model, x, y, THREAT, attack)
    assert torch.equal(state, torch.random.get_rng_state())
    assert (found - x).abs().max() <= THREAT.epsilon + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    right, withstood = predict(model, x) == y, predict(model, found) == y
    assert withstood.sum() < right.sum() - 5
    assert not (withstood & ~right).any()
    changed = (found != x).flatten(1).any(dim=1)
    assert torch.equal(changed, right & ~withstood)
    assert torch.equal(found, find_adversarial(model, x, y, THREAT, attack))
    assert find_adversarial(model, x[:0], y[:0], THREAT, attack).shape == (0, 1, 8, 8)


def test_an_engine_is_asked_itself(trained_bundle: Bundle) -> None:
    x, y = (tensor.numpy() for tensor in some_digits(40))
    with open_runner(trained_bundle, "onnxruntime", threads=1) as runner:

        def answer(images: np.ndarray) -> np.ndarray:
            return runner.infer(images).logits

        found = attack_predictions(answer, x, y, THREAT, AttackSpec(name="rays", steps=100))
        before, after = answer(x).argmax(axis=1) == y, answer(found).argmax(axis=1) == y
    assert np.abs(found - x).max() <= THREAT.epsilon + 1e-6
    assert after.sum() < before.sum() - 2


def test_verify_lets_the_engine_answer(
    trained_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = (AttackSpec(name="rays", steps=60),)
    monkeypatch.setattr(verify_module, "attack_suite", lambda *_: suite)
    report = verify_bundle(trained_bundle, images=30, epsilon=0.3, threads=1)
    (last,) = report.attacks
    assert (last.title, last.found_on) == ("rays-60", "engine")
    assert last.robust_accuracy.engine < report.clean_accuracy.engine
    assert last.robust_accuracy.reference == last.robust_accuracy.engine


@pytest.mark.parametrize("name", ["square", "rays"])
def test_an_answer_that_is_not_finite_is_a_mistake(name: str) -> None:
    def overflowing(images: np.ndarray) -> np.ndarray:
        logits = np.tile(np.float32([3, 0]), (len(images), 1))
        logits[images[:, 0, 0, 0] > 0.55] = np.nan
        return logits

    x, y = GREY.numpy(), np.zeros(3, dtype=np.int64)
    attack = AttackSpec(name=name, steps=300)
    found = attack_predictions(overflowing, x, y, THREAT, attack)
    assert np.isnan(overflowing(found)).all()


def test_what_makes_no_sense_is_refused() -> None:
    x, y = some_digits(2)
    with pytest.raises(ValidationError, match="restarts=2 of rays, which has its own"):
        AttackSpec(name="rays", restarts=2)
    with pytest.raises(UsageError, match="only square and rays attack predictions"):
        attack_predictions(lambda a: a, x.numpy(), y.numpy(), THREAT, AttackSpec(name="apgd"))

"""A batch goes through the model in pieces, which changes neither examples nor what is counted."""

import pytest
import torch

from advmoe_deploy.analysis.protocol.capacity import CapacityLimited
from advmoe_deploy.attacks import batches
from advmoe_deploy.attacks.effort import attack_task, passes_of
from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.models.stored import reference_model
from advmoe_deploy.progress import Silent
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.specs import AttackSpec, ThreatModel
from advmoe_deploy.verify.trial import Trial
from tests.attacks.digits import TARGETS, THREAT, some_digits

ATTACKS = [
    *[AttackSpec(name="pgd", steps=2, target=target) for target in TARGETS],
    AttackSpec(name="apgd", steps=2),
    AttackSpec(name="square", steps=2),
]


# No image is left alone before the end.
TURNS_NOBODY = ThreatModel(epsilon=1e-6)


class Counted(Silent):
    """Counts what it hears of."""

    def __init__(self) -> None:
        self.total = self.steps = 0

    def start(self, task: str, total: int, done: int = 0) -> None:
        self.total += total

    def advance(self, task: str, steps: int = 1, **figures: float) -> None:
        self.steps += steps


def asked_of(model: Classifier, attack: AttackSpec) -> list[int]:
    """Return how many images ``model`` was asked about in each pass while 20 were attacked."""
    x, y = some_digits(20)
    asked: list[int] = []
    with model.register_forward_hook(lambda _, given, __: asked.append(len(given[0]))):
        find_adversarial(model, x, y, THREAT, attack)
    return asked


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.name} {attack.target}")
def test_pieces_find_the_same_examples(
    model: AdvMoE, attack: AttackSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = some_digits(20)
    whole = find_adversarial(model, x, y, THREAT, attack)
    monkeypatch.setattr(batches, "_PIECE_PIXELS", 0)
    asked = asked_of(model, attack)
    # Before it starts an attack may look at the whole batch; one loss is of all images together.
    assert (sum(images > 8 for images in asked) > 4) == (attack.target == "auxiliary")
    found = find_adversarial(model, x, y, THREAT, attack)
    # A rounding turns the sign of a gradient that is almost zero.
    assert ((found - whole).abs() < 1e-6).float().mean() > 0.99


def test_images_that_share_an_experts_room_stay_together(
    model: AdvMoE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_PIECE_PIXELS", 0)
    attack = AttackSpec(name="pgd", steps=2)
    assert set(asked_of(CapacityLimited(model, 1.0), attack)) == {20}


def test_answers_by_the_routes_of_other_images_are_the_same_in_pieces(
    model: AdvMoE, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, _ = some_digits(60)
    whole = predict(model, x, routes_of=x.flip(0))
    assert not torch.equal(whole, predict(model, x))  # routes matter
    monkeypatch.setattr(batches, "_PIECE_PIXELS", 0)
    assert torch.equal(whole, predict(model, x, routes_of=x.flip(0)))


def test_large_images_come_fewer_at_once(model: AdvMoE) -> None:
    sizes = {side: torch.empty(0, 3, side, side) for side in (8, 32, 64, 224, 4000)}
    batch = {side: batches.batch_size(images) for side, images in sizes.items()}
    piece = {side: batches.piece_size(model, images) for side, images in sizes.items()}
    assert batch == {8: 256, 32: 256, 64: 256, 224: 20, 4000: 8}
    assert piece == {8: 256, 32: 64, 64: 16, 224: 8, 4000: 8}
    assert batches.piece_size(model, sizes[32].to("meta")) == 256  # a GPU takes the whole batch


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.name} {attack.target}")
def test_an_attack_makes_as_many_passes_as_were_told(
    model: AdvMoE, attack: AttackSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_PIECE_PIXELS", 0)
    x, y = some_digits(20)
    right = predict(model, x) == y
    x, y, heard = x[right], y[right], Counted()
    with attack_task(heard, model, attack, len(x)):
        find_adversarial(model, x, y, TURNS_NOBODY, attack, first_only=True)
    assert heard.total == passes_of(model, attack, len(x))
    # Before it starts PGD looks at each image once more; where its loss is another, twice.
    assert 0 <= heard.steps - heard.total <= 2 * len(x)


def test_questions_to_an_engine_count_as_passes(tiny_bundle: Bundle) -> None:
    model, digits, heard = reference_model(tiny_bundle), load_dataset("digits").test, Counted()
    images, labels = to_float(digits.images[:60]), digits.labels[:60]
    attack = AttackSpec(name="square", steps=4)
    with open_runner(tiny_bundle, threads=1) as runner:
        outcome = Trial(model, runner, images, labels, TURNS_NOBODY, heard).run(attack, "engine")
    assert outcome.images > 0
    assert heard.total == passes_of(model, attack, outcome.images)
    assert 0 <= heard.steps - heard.total <= outcome.images

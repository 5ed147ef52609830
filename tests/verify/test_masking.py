"""Signs of masked gradients: none in a model that is attacked as it should be, else some."""

from pathlib import Path

import pytest
import torch

from advmoe_deploy.attacks import batches
from advmoe_deploy.attacks.white_box import attack_model, predict
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.progress import Silent
from advmoe_deploy.reports import Pair
from advmoe_deploy.specs import AttackSpec, ThreatModel
from advmoe_deploy.verify import masking
from advmoe_deploy.verify.masking import masking_signs, warnings_of
from advmoe_deploy.verify.report import AttackOutcome, Sign
from tests.conftest import TRAINED_RUN

THREAT = ThreatModel(epsilon=0.05)
TEST = load_dataset("digits").test


def signs(model: Classifier, outcomes: list[AttackOutcome] | None = None) -> dict[str, Sign]:
    found = masking_signs(model, to_float(TEST.images), TEST.labels, THREAT, outcomes or [])
    return {sign.name: sign for sign in found}


def outcome(name: str, left: float) -> AttackOutcome:
    return AttackOutcome(
        attack=AttackSpec(name=name, steps=9),
        found_on="reference",
        images=100,
        robust_accuracy=Pair(reference=left, engine=left),
        route_flip_rate=None,
        route_agreement=None,
        seconds=1.0,
    )


def test_a_trained_model_shows_none(trained_run: Path) -> None:
    _, model = load_checkpoint(trained_run / "model")
    found = signs(model, [outcome("pgd", 0.6), outcome("square", 0.6)])
    assert len(found) == 5
    assert warnings_of(tuple(found.values())) == ()


def test_what_the_suite_searched_is_not_searched_again(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = load_checkpoint(trained_run / "model")
    x, y = to_float(TEST.images[:30]), TEST.labels[:30]
    right = int((predict(model, torch.from_numpy(x)).numpy() == y).sum())
    attack, ran = AttackSpec(name="pgd", steps=20), list[int]()

    def counting(*given: object, **how: object) -> torch.Tensor:
        ran.append(given[4].steps)  # type: ignore[attr-defined]
        return attack_model(*given, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(masking, "attack_model", counting)
    own = masking_signs(model, x, y, THREAT, [])
    assert 20 in ran
    found = attack_model(
        model, torch.from_numpy(x), torch.from_numpy(y), THREAT, attack, first_only=True
    )
    share = float((predict(model, found).numpy() == y).mean())
    told = outcome("pgd", share).model_copy(update={"attack": attack, "images": right})
    ran.clear()
    assert masking_signs(model, x, y, THREAT, [told])[1] == own[1]
    assert 20 not in ran


def test_logits_times_1000_do(trained_run: Path) -> None:
    _, model = load_checkpoint(trained_run / "model")
    with torch.no_grad():
        model.backbone.linear.weight.mul_(1000)
        model.backbone.linear.bias.mul_(1000)
    found = signs(model)
    # Another run may withstand the class margin, too.
    assert found["losses"].suspicious or trained_run != TRAINED_RUN.resolve()
    assert found["gradients"].suspicious
    assert not found["epsilon 1"].suspicious


@pytest.mark.parametrize(("left", "suspicious"), [(0.5, False), (0.495, False), (0.45, True)])
def test_a_black_box_that_finds_more_does(left: float, suspicious: bool, trained_run: Path) -> None:
    _, model = load_checkpoint(trained_run / "model")
    outcomes = [outcome("pgd", 0.6), outcome("pgd", 0.5), outcome("square", left)]
    assert signs(model, outcomes)["black box against white box"].suspicious == suspicious


def test_black_boxes_count_together(trained_run: Path) -> None:
    _, model = load_checkpoint(trained_run / "model")
    # Each breaks 1.5 % of what was left before it, both together 3 %.
    outcomes = [outcome("pgd", 0.5), outcome("square", 0.4925), outcome("rays", 0.485)]
    assert signs(model, outcomes)["black box against white box"].suspicious
    assert not signs(model, outcomes[:2])["black box against white box"].suspicious


def test_a_model_that_is_never_right_is_not_attacked(trained_run: Path) -> None:
    _, model = load_checkpoint(trained_run / "model")
    wrong = (TEST.labels + 1) % 10
    with torch.no_grad():
        model.backbone.linear.weight.zero_()
        model.backbone.linear.bias.zero_()
        model.backbone.linear.bias[3] = 1.0
    keep = (TEST.labels != 3) & (wrong != 3)
    found = masking_signs(model, to_float(TEST.images[keep]), TEST.labels[keep], THREAT, [])
    assert [sign.name for sign in found] == ["black box against white box"]


def test_gradients_are_taken_in_pieces(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = load_checkpoint(trained_run / "model")
    x, y = torch.from_numpy(to_float(TEST.images[:40])), torch.from_numpy(TEST.labels[:40])
    probe = masking._Probe(model, x, y, THREAT, Silent())
    whole, passed = probe.gradients(), list[int]()
    model.register_forward_pre_hook(lambda module, given: passed.append(len(given[0])))
    monkeypatch.setattr(batches, "_PIECE_PIXELS", 16 * 8**2)
    assert probe.gradients() == whole
    assert passed == [16, 16, 8]

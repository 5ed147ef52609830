"""What the accuracy gate examines: attacked along pathways, in batches of any size, by chance."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from advmoe_deploy.attacks.black_box import TorchFace
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.precision.attacked import attacked_images, with_accuracy
from advmoe_deploy.export.precision.gate import (
    ATTACK,
    PATHWAY_ATTACK,
    AccuracyGate,
    AnsweredImages,
    attack_itself,
    run_gate,
    too_much,
)
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.parity.batches import require_any_batch
from advmoe_deploy.parity.drop import Drop
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.specs import AttackSpec, ThreatModel
from tests.conftest import TINY, TRAINED_RUN
from tests.families import spec_of

IMAGES = np.random.default_rng(1).random((24, 1, 8, 8), dtype=np.float32)
THREAT = ThreatModel(epsilon=0.05)


def gate_of(model: Classifier) -> AccuracyGate:
    return AccuracyGate(AnsweredImages(IMAGES, reference_answers(model, IMAGES)), "noise")


def test_pathways_turn_images_that_withstand_the_model_as_it_runs(trained_run: Path) -> None:
    _, model = load_checkpoint(trained_run / "model")
    split = load_dataset("digits").holdout.first(60)
    images, labels_N = to_float(split.images), split.labels

    def standing(
        attacks: Sequence[AttackSpec], few: int | None = None, *, asked: bool = False
    ) -> NDArray[np.bool_]:
        face = TorchFace(lambda x: reference_answers(model, x).logits) if asked else None
        found = attacked_images(model, images, labels_N, THREAT, face, attacks, few)
        assert np.abs(found - images).max() <= THREAT.epsilon + 1e-6
        return predict(model, torch.from_numpy(found)).numpy() == labels_N

    as_it_runs = standing([ATTACK])
    along_pathways = standing([ATTACK, PATHWAY_ATTACK])
    assert not (along_pathways & ~as_it_runs).any()
    # Pathways of another run may agree wherever the model withstands.
    assert along_pathways.sum() < as_it_runs.sum() or trained_run != TRAINED_RUN.resolve()
    few = standing([ATTACK, PATHWAY_ATTACK], few=10)
    np.testing.assert_array_equal(few[:10], along_pathways[:10])
    np.testing.assert_array_equal(few[10:], as_it_runs[10:])
    # One that is attacked by its answers alone is found as weak.
    asked = standing([ATTACK, PATHWAY_ATTACK], asked=True)
    np.testing.assert_array_equal(asked, along_pathways)


@pytest.mark.parametrize(
    ("family", "targets", "images"),
    [
        ("dense", ["model"], 0),
        ("conv experts", ["model", "pathway"], 200),
    ],
)
def test_models_that_route_are_attacked_along_pathways(
    family: str, targets: list[str], images: int
) -> None:
    spec = TINY.dense() if family == "dense" else spec_of(family)
    model = build_model(spec).eval()
    gate = with_accuracy(gate_of(model), model, load_dataset("digits"), THREAT)
    assert [attack.target for attack in gate.attacks] == targets
    assert gate.pathway_images == images


class Batched:
    """Answers as ``runner`` does, but for the last image of three, which gets no answer."""

    name, tf32 = "batched", False

    def __init__(self, runner: PlanRunner, moved: float) -> None:
        self.runner, self.moved = runner, moved
        self.precision = runner.precision

    def infer(self, images: NDArray[np.float32]) -> Prediction:
        answer = self.runner.infer(images)
        if len(images) == 3:
            answer.logits[-1] *= 1 + self.moved
        return answer


def test_answers_that_depend_on_the_batch_are_complained_of(
    tiny_run: Path, tiny_bundle: Bundle
) -> None:
    _, model = load_checkpoint(tiny_run / "model")
    with open_runner(tiny_bundle, threads=1) as runner:
        findings = run_gate(gate_of(model), runner)
        assert findings.batches == findings.complaint == ""
        moved = run_gate(gate_of(model), Batched(runner, 0.05))
    assert moved.complaint == moved.batches
    assert moved.batches.startswith("in batches of 3, logits differ from those in one batch by ")
    with pytest.raises(CheckFailedError, match=r"engines/x: in batches of 3, .* no bundle was"):
        require_any_batch(moved.batches, "engines/x")


def test_the_same_model_withstands_as_much_when_it_is_attacked_itself(
    tiny_run: Path, tiny_bundle: Bundle
) -> None:
    _, model = load_checkpoint(tiny_run / "model")
    gate = with_accuracy(gate_of(model), model, load_dataset("digits"), THREAT)
    with open_runner(tiny_bundle, threads=1) as runner:
        findings = attack_itself(gate, runner, run_gate(gate, runner))
    assert {*findings.drops} == {"clean", "robust", "own_attack"}
    for drop in findings.drops.values():
        assert (drop.images, drop.only_reference, drop.only_engine) == (200, 0, 0)
    assert findings.own_attack is not None
    assert findings.own_attack.robust_accuracy == findings.robust_accuracy
    assert not findings.complaint


@pytest.mark.parametrize(
    ("images", "falsely", "found"), [(200, 0.15, 0.45), (500, 0.18, 0.75), (1000, 0.20, 0.92)]
)
@pytest.mark.parametrize("rate", [0.01, 0.02, 0.03, 0.04])
def test_how_often_chance_refuses_and_a_planted_drop_does(
    images: int, falsely: float, found: float, rate: float
) -> None:
    """Of 200 images, 4 to 11 % without a drop are refused; the estimate alone refused 13 to 29 %.

    A true drop of 2 points is refused in 52 to 69 % of all cases; of 1,000 images, in 95 to 99 %.
    """

    def refused(lost: float) -> float:
        draws = np.random.default_rng(0).multinomial(
            images, [rate / 2 + lost, rate / 2, 1 - rate - lost], size=1000
        )
        drops = (
            Drop(images=images, only_reference=b, only_engine=c) for b, c in draws[:, :2].tolist()
        )
        return float(np.mean([too_much(drop, 0.5) for drop in drops]))

    assert refused(0.0) <= falsely
    assert refused(0.02) >= found

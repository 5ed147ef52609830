"""Images attacked on the torch model, for the accuracy gate and for calibration.

Shapes: N images, C channels, H height, W width.
"""

from dataclasses import replace

import torch

from advmoe_deploy.attacks.black_box import TorchFace
from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.objectives import Answer
from advmoe_deploy.data.dataset import Dataset, to_float
from advmoe_deploy.export.precision.gate import ATTACK, AccuracyGate, Examples, Labels, Logits
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.parity.answers import Images
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.specs import AttackSpec, ThreatModel

GATE_IMAGES = 500


def with_accuracy(
    gate: AccuracyGate, model: Classifier, labelled: Dataset, threat: ThreatModel | None
) -> AccuracyGate:
    """Return ``gate`` with hold-out images of ``labelled``, clean and attacked as in ``threat``."""
    split = labelled.holdout.first(GATE_IMAGES)
    clean = to_float(split.images)
    gate = replace(
        gate, labelled=labelled.source, labels_N=split.labels, clean=_examples(model, clean)
    )
    if threat is None:
        return gate

    def attack(logits: Logits | None) -> Images:
        answer = None if logits is None else TorchFace(logits)
        return attacked_images(model, clean, split.labels, threat, answer)

    return replace(gate, attacked=_examples(model, attack(None)), attack=attack)


def attacked_images(
    model: Classifier,
    images: Images,
    labels_N: Labels,
    threat: ThreatModel,
    answer: Answer | None = None,
    attack: AttackSpec = ATTACK,
) -> Images:
    """Return what ``attack`` makes of ``images`` on the torch model, or on who answers."""
    x_NCHW, y_N = torch.from_numpy(images), torch.from_numpy(labels_N)
    return find_adversarial(model, x_NCHW, y_N, threat, attack, answer=answer).numpy()


def _examples(model: Classifier, images: Images) -> Examples:
    return Examples(images, reference_answers(model, images))

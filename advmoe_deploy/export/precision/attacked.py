"""Images attacked on the torch model, for the accuracy gate and for calibration.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from advmoe_deploy.attacks.batches import labelled_batches
from advmoe_deploy.attacks.black_box import TorchFace
from advmoe_deploy.attacks.effort import attack_task
from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.losses import is_wrong
from advmoe_deploy.attacks.objectives import PULLS, Answer
from advmoe_deploy.attacks.pathways import count_pathways
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.data.dataset import Dataset, to_float
from advmoe_deploy.export.precision.gate import (
    ATTACK,
    PATHWAY_ATTACK,
    AccuracyGate,
    AnsweredImages,
    LogitsOf,
)
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.parity.answers import Images, Labels
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.specs import AttackSpec, ThreatModel

# As many hold-out images are examined, if there are as many: an attack takes most of the time.
GATE_IMAGES = 1000
# A model of two pathways is attacked along them on all images, for at most four times as long as by
# the first attack; one of more pathways on fewer images.
_MOST_SEARCHES = 4 * GATE_IMAGES


def with_accuracy(
    gate: AccuracyGate,
    model: Classifier,
    labelled: Dataset,
    threat: ThreatModel | None,
    progress: Progress | None = None,
) -> AccuracyGate:
    """Return ``gate`` with hold-out images of ``labelled``, clean and attacked as in ``threat``."""
    split = labelled.holdout.first(GATE_IMAGES)
    clean = to_float(split.images)
    gate = replace(
        gate, labelled=labelled.source, labels_N=split.labels, clean=_examples(model, clean)
    )
    if threat is None:
        return gate

    attacks = (ATTACK, PATHWAY_ATTACK) if model.rules else (ATTACK,)
    few = min(len(clean), _pathway_images(model))

    def attack(logits: LogitsOf | None) -> Images:
        answer = None if logits is None else TorchFace(logits)
        return attacked_images(model, clean, split.labels, threat, answer, attacks, few, progress)

    attacked = _examples(model, attack(None))
    return replace(gate, attacked=attacked, attack=attack, attacks=attacks, pathway_images=few)


def _pathway_images(model: Classifier) -> int:
    """Return on how many images all pathways of ``model`` can be tried; of none, there are none."""
    tries = len(PULLS) * count_pathways(model) if model.rules else 0
    return max(1, _MOST_SEARCHES // tries) if tries else 0


def attacked_images(
    model: Classifier,
    images: Images,
    labels_N: Labels,
    threat: ThreatModel,
    answer: Answer | None = None,
    attacks: Sequence[AttackSpec] = (ATTACK,),
    few: int | None = None,
    progress: Progress | None = None,
) -> Images:
    """Return the worst that ``attacks`` make of ``images`` on the torch model, or on who answers.

    The first attack is made on all of them, each other one on those of the first ``few`` that the
    attacks before it could not turn; one that none turned comes back as the first left it. They
    search to the end, not to the first example that fools: one that barely fools the torch model
    would say nothing of an engine that was made from it.
    """
    x_NCHW, y_N = torch.from_numpy(images), torch.from_numpy(labels_N)
    first, *others = attacks
    progress = progress or Silent()
    with attack_task(progress, model, first, len(images)):
        found_NCHW = find_adversarial(model, x_NCHW, y_N, threat, first, answer=answer)
    for attack in others:
        left_N = (~_wrong(model, found_NCHW[:few], y_N[:few], answer)).nonzero()[:, 0]
        labels_A = y_N[left_N]
        with attack_task(progress, model, attack, len(left_N)):
            found_ACHW = find_adversarial(
                model, x_NCHW[left_N], labels_A, threat, attack, answer=answer
            )
        turned_A = _wrong(model, found_ACHW, labels_A, answer)
        found_NCHW[left_N[turned_A]] = found_ACHW[turned_A]
    return found_NCHW.numpy()


@torch.no_grad()
def _wrong(model: Classifier, x_NCHW: Tensor, y_N: Tensor, answer: Answer | None) -> Tensor:
    """Return which images [n] are not answered their label."""
    if answer is None:
        return predict(model, x_NCHW) != y_N
    return torch.cat([is_wrong(answer(x), y) for x, y in labelled_batches(x_NCHW, y_N)])


def _examples(model: Classifier, images: Images) -> AnsweredImages:
    return AnsweredImages(images, reference_answers(model, images))

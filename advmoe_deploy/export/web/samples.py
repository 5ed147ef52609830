"""Samples of a page: test images, clean and attacked ever harder.

Shapes: S samples, A attacks (the first is none), C channels, H height, W width, N images.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.matching import Trained, matching_test_images
from advmoe_deploy.data.registry import absolute
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.stored import reference_model, threat_or
from advmoe_deploy.progress import Progress, task
from advmoe_deploy.specs import AttackSpec, ThreatModel

# Of the radius that the model was trained for.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
_STEPS = 20
_AMONG = 500  # the first test images, of which classes take turns


@dataclass(frozen=True)
class Samples:
    """Images float32 [S, A, C, H, W] in [0, 1], their labels [S], and the radius of each attack.

    ``attack`` says in words how the images were found, ``source`` where the clean ones come from.
    """

    images_SACHW: NDArray[np.float32]
    labels_S: NDArray[np.int64]
    epsilons_A: tuple[float, ...]
    attack: str
    source: str


def attacked_samples(
    bundle: Bundle,
    count: int,
    progress: Progress,
    *,
    data: str | None = None,
    class_map: Mapping[str, str] | None = None,
    epsilon: float | None = None,
) -> Samples:
    """Return ``count`` test images of ``data``, or of what the model was trained on, attacked.

    The reference model is attacked, by PGD on its routes and pathways where it routes. What fooled
    it within a radius is shown within larger ones too, where the search finds nothing there.

    Raises:
        BundleError: the bundle holds no reference weights.
        UsageError: neither the bundle nor ``epsilon`` says a radius, or the data do not fit.
        DataError: the data cannot be read.
    """
    model, manifest = reference_model(bundle), bundle.manifest
    threat = threat_or(epsilon, manifest.threat, bundle.path)
    source = absolute(data or manifest.data, manifest.model.image_size)
    x_NCHW, labels_N = matching_test_images(
        source, Trained.of(manifest), max(_AMONG, count), class_map=class_map
    )
    rows_S = _in_turn(labels_N)[:count]
    epsilons_A = tuple(min(1.0, share * threat.epsilon) for share in SHARES)
    images_SACHW = _attacked(model, x_NCHW[rows_S], labels_N[rows_S], epsilons_A, progress)
    aim = "on routes and pathways" if model.rules else "on the network"
    return Samples(
        images_SACHW,
        labels_N[rows_S],
        epsilons_A,
        f"PGD, {_STEPS} steps, {aim}, with the weights known",
        source.partition(":")[0],  # not the folder, which is nobody's business
    )


def _in_turn(labels_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the images in such an order that classes take turns."""
    seen: Counter[int] = Counter()
    rounds_N = np.zeros_like(labels_N)
    for image, label in enumerate(labels_N.tolist()):
        rounds_N[image] = seen[label]
        seen[label] += 1
    return np.lexsort((labels_N, rounds_N))


def _attacked(
    model: Classifier,
    x_SCHW: NDArray[np.float32],
    labels_S: NDArray[np.int64],
    epsilons_A: tuple[float, ...],
    progress: Progress,
) -> NDArray[np.float32]:
    attack = AttackSpec(
        name="pgd",
        steps=_STEPS,
        target="pathway" if model.rules else "model",
        loss="margin",
        momentum=0.75,
        decay=True,
    )
    clean, labels = torch.from_numpy(x_SCHW), torch.from_numpy(labels_S)
    found = [clean]
    with task(progress, "attack", len(epsilons_A) - 1):
        for epsilon in epsilons_A[1:]:
            threat = ThreatModel(epsilon=epsilon)
            images = find_adversarial(model, clean, labels, threat, attack)
            found.append(_worse(model, images, found[-1], labels))
            progress.advance("attack", epsilon=epsilon)
    return torch.stack(found, dim=1).numpy()


def _worse(model: Classifier, images: Tensor, weaker: Tensor, labels: Tensor) -> Tensor:
    """Return ``images``, or those of a weaker attack where these alone fool the model."""
    kept_S = (predict(model, images) == labels) & (predict(model, weaker) != labels)
    return torch.where(kept_S[:, None, None, None], weaker, images)

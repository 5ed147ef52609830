"""Black-box attacks on anything that answers with logits: an engine, a server, a torch model."""

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from advmoe_deploy.attacks.autoattack import Predict, square
from advmoe_deploy.attacks.batches import labelled_batches
from advmoe_deploy.attacks.losses import is_wrong
from advmoe_deploy.attacks.rays import rays
from advmoe_deploy.errors import UsageError
from advmoe_deploy.specs import AttackSpec, ThreatModel

NAMES = ("square", "rays")  # of those that need no gradient
Images = npt.NDArray[np.float32]


def attack_predictions(
    predict: Callable[[Images], Images],
    images: Images,
    labels: npt.NDArray[np.int64],
    threat: ThreatModel,
    attack: AttackSpec,
) -> Images:
    """Return adversarial images float32 [N, C, H, W] by Square or RayS.

    RayS asks about each image ``attack.steps`` times at most; Square in each restart tries as many
    squares, and asks about the image, its first stripes and what it ends with besides.
    ``predict`` gets float32 images [n, C, H, W] in [0, 1], n from 1 to 256, and returns logits
    [n, classes]; NaN and infinity answer nothing and thus are a mistake. The same seed gives the
    same examples. An image no query turned comes back at its clean self.

    Raises:
        UsageError: the attack needs gradients.
    """
    if attack.name not in NAMES:
        able = " and ".join(NAMES)
        raise UsageError(f"{attack.name} needs gradients; only {able} attack predictions")
    x, y = torch.from_numpy(np.array(images)), torch.from_numpy(np.array(labels))
    return ask_only(TorchFace(predict), x, y, threat, attack).numpy()


def ask_only(
    predict: Predict,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    attack: AttackSpec,
) -> Tensor:
    """Return adversarial images [N, C, H, W] by an attack of :data:`NAMES`, in batches.

    ``predict`` gets float images [n, C, H, W], n from 1 to 256, and returns logits [n, K].
    """
    find = partial(_rays if attack.name == "rays" else _square, predict, threat, attack)
    if not len(images):
        return images.clone()
    return torch.cat([find(x, y) for x, y in labelled_batches(images, labels)])


def _rays(
    predict: Predict, threat: ThreatModel, attack: AttackSpec, x: Tensor, y: Tensor
) -> Tensor:
    def fooled(asked: Tensor, labels: Tensor) -> Tensor:
        return is_wrong(predict(asked), labels)

    return rays(fooled, x, y, epsilon=threat.epsilon, queries=attack.steps, seed=attack.seed)


def _square(
    predict: Predict, threat: ThreatModel, attack: AttackSpec, x: Tensor, y: Tensor
) -> Tensor:
    def answer(asked: Tensor) -> Tensor:
        logits_NK = predict(asked)
        # NaN would be an answer that Square cannot fool; so it is that of one more class.
        finite_N1 = torch.isfinite(logits_NK).all(dim=1, keepdim=True)
        logits_NK = torch.where(finite_N1, logits_NK, 0)
        none_N1 = torch.where(finite_N1, logits_NK.amin(dim=1, keepdim=True), 1)
        return torch.cat([logits_NK, none_N1], dim=1)

    how = {"restarts": attack.restarts, "seed": attack.seed}
    return square(answer, x, y, epsilon=threat.epsilon, queries=attack.steps, **how)


class TorchFace:
    """Shows a numpy ``predict`` to code that speaks torch and writes into what it gets."""

    def __init__(self, predict: Callable[[Images], Images]) -> None:
        self._predict = predict
        self._classes = 1

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits [n, K] of float images [n, C, H, W]."""
        if not len(images):  # Square asks this when its very first squares end in ties
            return torch.zeros(0, self._classes)
        logits = np.array(self._predict(np.ascontiguousarray(images.numpy())))
        self._classes = logits.shape[1]
        return torch.from_numpy(logits)

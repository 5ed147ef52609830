"""Black-box attacks on anything that answers with logits: an engine, a server, a torch model."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from advmoe_deploy.attacks.autoattack import square
from advmoe_deploy.errors import UsageError
from advmoe_deploy.specs import AttackSpec, ThreatModel

BATCH = 256  # fixed: the random squares, hence the examples, depend on it
Images = npt.NDArray[np.float32]


def attack_predictions(
    predict: Callable[[Images], Images],
    images: Images,
    labels: npt.NDArray[np.int64],
    threat: ThreatModel,
    attack: AttackSpec,
) -> Images:
    """Return adversarial images float32 [N, C, H, W] by Square with ``attack.steps`` queries.

    ``predict`` gets float32 images [n, C, H, W] in [0, 1], n from 1 to 256, and returns logits
    [n, classes]. The same seed gives the same examples. An image no query turned comes back at
    its clean self.

    Raises:
        UsageError: the attack needs gradients.
    """
    if attack.name != "square":
        raise UsageError(f"{attack.name} needs gradients; only square attacks predictions")
    ask = TorchFace(predict)
    found = [
        square(
            ask,
            torch.from_numpy(np.array(images[i : i + BATCH])),
            torch.from_numpy(np.array(labels[i : i + BATCH])),
            epsilon=threat.epsilon,
            queries=attack.steps,
            restarts=attack.restarts,
            seed=attack.seed,
        ).numpy()
        for i in range(0, len(images), BATCH)
    ]
    return np.concatenate(found) if found else images.copy()


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

"""What the torch model answers: the truth that every export is compared with.

Shapes: N images, C classes, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advmoe_deploy.models.advmoe import ROUTER, AdvMoE
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing import Routes

_BATCH = 128

Images = NDArray[np.float32]


@dataclass(frozen=True)
class Answers:
    """Logits [N, C]; scores [N, E] and ids [N, 1] of a model that routes, else ``None``."""

    logits: NDArray[np.float32]
    scores: NDArray[np.float32] | None
    expert_ids: NDArray[np.int64] | None

    @property
    def margins(self) -> NDArray[np.float32] | None:
        """Distance between the two best scores of each image."""
        if self.scores is None:
            return None
        best = np.sort(self.scores, axis=1)
        with np.errstate(invalid="ignore"):  # infinity less infinity: no number, no clear margin
            return np.asarray(best[:, -1] - best[:, -2])


def reference_answers(model: Classifier, images: Images) -> Answers:
    """Return what ``model`` answers to float32 images [N, C, H, W] in [0, 1]."""
    if not isinstance(model, AdvMoE):
        return Answers(_in_batches(model, images)[0], None, None)

    def run(x_NCHW: Tensor) -> tuple[Tensor, ...]:
        routes = Routes()
        logits = model(x_NCHW, routes)
        routing = routes.taken[ROUTER]
        return logits, routing.scores_NE, routing.expert_ids_NK

    logits, scores, ids = _in_batches(run, images)
    return Answers(logits, scores, ids)


def forced_answers(model: AdvMoE, images: Images, expert: int) -> NDArray[np.float32]:
    """Return the logits of ``model`` when every image is sent to ``expert``."""
    return _in_batches(lambda x_NCHW: model(x_NCHW, model.forced(expert)), images)[0]


def _in_batches(run: Callable[[Tensor], Any], images: Images) -> list[NDArray[Any]]:
    parts = []
    with torch.inference_mode():
        for x_NCHW in torch.split(torch.from_numpy(images), _BATCH):
            answer = run(x_NCHW)
            parts.append(answer if isinstance(answer, tuple) else (answer,))
    return [torch.cat(column).numpy() for column in zip(*parts, strict=True)]

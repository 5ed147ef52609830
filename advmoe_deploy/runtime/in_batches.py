"""Any number of images, for a runner whose engines take some numbers only."""

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.runtime.closing import Closing
from advmoe_deploy.runtime.prediction import Prediction
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.specs import BatchProfile, Precision


class InBatches(Closing):
    """Splits more than ``batch.max`` images, and fills up less than ``batch.min``."""

    def __init__(self, runner: Runner, batch: BatchProfile) -> None:
        self._runner, self._batch = runner, batch
        self.name = runner.name
        self.precision: Precision = runner.precision

    def infer(self, images: NDArray[np.float32]) -> Prediction:
        """Return the prediction for float32 images [N, C, H, W] in [0, 1], in their order."""
        largest = self._batch.max
        parts = [self._infer(images[i : i + largest]) for i in range(0, len(images), largest)]
        return joined(parts) if len(parts) != 1 else parts[0]

    def _infer(self, images: NDArray[np.float32]) -> Prediction:
        missing = self._batch.min - len(images)
        if missing <= 0:
            return self._runner.infer(images)
        filled = np.concatenate([images, np.repeat(images[:1], missing, axis=0)])
        answer, count = self._runner.infer(filled), len(images)
        return Prediction(
            answer.logits[:count],
            {layer: ids[:count] for layer, ids in answer.expert_ids.items()},
            {layer: weights[:count] for layer, weights in answer.weights.items()},
        )

    def close(self) -> None:
        """Close the runner."""
        self._runner.close()


def joined(parts: list[Prediction]) -> Prediction:
    """Return the predictions of consecutive images as one; there is at least one."""
    first = parts[0]
    return Prediction(
        np.concatenate([part.logits for part in parts]),
        {n: np.concatenate([part.expert_ids[n] for part in parts]) for n in first.expert_ids},
        {n: np.concatenate([part.weights[n] for part in parts]) for n in first.weights},
    )

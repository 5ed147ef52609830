"""What a runner answers.

Shapes: N images, C classes, K experts per image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Prediction:
    """Logits float32 [N, C], and for each routed layer the ids int64 [N, K] and weights [N, K]."""

    logits: NDArray[np.float32]
    expert_ids: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    weights: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def joined(parts: Sequence[Prediction]) -> Prediction:
    """Return the predictions of consecutive images as one; there is at least one."""
    first = parts[0]
    return Prediction(
        np.concatenate([part.logits for part in parts]),
        {n: np.concatenate([part.expert_ids[n] for part in parts]) for n in first.expert_ids},
        {n: np.concatenate([part.weights[n] for part in parts]) for n in first.weights},
    )

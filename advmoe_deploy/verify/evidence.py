"""Evidence: the answers of an engine and of its reference to the same images, row by row.

Shapes: N images, C classes, R rows of a layer (images, or tokens), E experts, K experts per row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import Routes, Routing
from advmoe_deploy.parity.answers import Answers, Flags, Images
from advmoe_deploy.parity.tolerance import (
    LOSSY_ROW,
    relative_distances,
    row_differences,
    same_experts,
)
from advmoe_deploy.runtime.runner import Prediction

Logits = NDArray[np.float32]
ExpertIds = Mapping[str, NDArray[np.int64]]

# What happens by chance less often than this is taken for a fault.
UNLIKELY = 1e-3
_BATCH = 128


@dataclass(frozen=True)
class Closeness:
    """Tolerance of logits: within ``tolerance`` of float32, or in a lower precision."""

    exact: bool
    tolerance: float

    def near(self, answer_NC: Logits, expected_NC: Logits) -> Flags:
        """Return which rows [N] are the same; rows that are not finite are not."""
        if self.exact:
            return np.asarray(row_differences(answer_NC, expected_NC)[1] <= self.tolerance)
        return np.asarray(relative_distances(answer_NC, expected_NC) <= LOSSY_ROW)


@dataclass(frozen=True)
class Evidence:
    """Answers of both to ``x_NCHW``; ``margin`` is what a close call of routes is."""

    model: Classifier
    x_NCHW: Images
    reference: Answers
    answer: Prediction
    closeness: Closeness
    margin: float

    @property
    def images(self) -> int:
        """Number of images that were answered."""
        return len(self.x_NCHW)

    def ids(self, layer: str) -> NDArray[np.int64]:
        """Return the experts [R, K] that the engine says the rows of ``layer`` went to."""
        shape = self.reference.routes[layer].expert_ids.shape
        return self.answer.expert_ids[layer].reshape(shape)

    def flipped(self, layer: str) -> Flags:
        """Return which rows [R] went to other experts than in the reference."""
        return ~same_experts(self.reference.routes[layer].expert_ids, self.ids(layer))

    def clear(self, layer: str) -> Flags:
        """Return which rows [R] were no close call."""
        return np.asarray(self.reference.routes[layer].margins > self.margin)

    def by_image(self, rows_R: Flags) -> Flags:
        """Return which images [N] have such a row."""
        return np.asarray(rows_R.reshape(self.images, -1).any(axis=1))

    @cached_property
    def along(self) -> Logits:
        """Answers of the reference if it goes the way that the engine says it went."""
        return self.routed({layer: self.ids(layer) for layer in self.reference.routes})

    @cached_property
    def wrong(self) -> Flags:
        """Images [N] that the engine answers otherwise than the reference on the same way."""
        return ~self.closeness.near(self.answer.logits, self.along)

    def routed(self, ids: ExpertIds) -> Logits:
        """Return the logits of the reference, rows of its layers sent to the experts ``ids``.

        Experts weigh what the engine says they weigh.
        """
        logits = []
        with torch.inference_mode():
            for start in range(0, self.images, _BATCH):
                stop = min(self.images, start + _BATCH)
                routes = Routes({name: self._part(name, ids[name], start, stop) for name in ids})
                logits.append(self.model(torch.from_numpy(self.x_NCHW[start:stop]), routes))
        return torch.cat(logits).numpy()

    def _part(self, name: str, ids_RK: NDArray[np.int64], start: int, stop: int) -> Routing:
        each = len(ids_RK) // self.images
        rows = slice(start * each, stop * each)
        weights_RK = self.answer.weights[name].reshape(ids_RK.shape)
        return Routing(
            torch.from_numpy(self.reference.routes[name].scores[rows]),
            torch.from_numpy(np.ascontiguousarray(ids_RK[rows])),
            torch.from_numpy(np.ascontiguousarray(weights_RK[rows], dtype=np.float32)),
        )

"""Requests on their way through the batcher: a job each, cut into pieces that share a pathway."""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.runtime.pathways import Rows
from advmoe_deploy.runtime.runner import Prediction


class OverloadedError(Exception):
    """The request cannot be computed in time; ``retry_s`` is when it is worth another try."""

    def __init__(self, message: str, retry_s: float) -> None:
        super().__init__(message)
        self.retry_s = max(1, math.ceil(retry_s))


@dataclass
class Times:
    """Times of the parts of one request, in seconds; filled in while it is answered.

    ``wait`` is that in the queue, and ``compute`` of the batches that had images of it, when they
    were routed and when they ran.
    """

    read: float = 0.0
    decode: float = 0.0  # of an image file
    wait: float = 0.0
    compute: float = 0.0
    write: float = 0.0


class Job:
    """One request's images [N, C, H, W] on their way to a prediction."""

    def __init__(
        self,
        images: NDArray[np.float32],
        answer: "asyncio.Future[Prediction]",
        is_gone: Callable[[], bool],
        deadline: float,
        times: Times,
    ) -> None:
        self.images, self.answer, self.is_gone, self.times = images, answer, is_gone, times
        self.size = len(images)
        self.deadline, self.came = deadline, time.monotonic()
        self.routed = 0  # images that wait at a pathway, or did
        self.left = self.size  # images without an answer
        self.begun = False  # whether an image is in a batch, or was
        self._prediction: Prediction | None = None

    def dead(self) -> str:
        """Return why it is not to be computed, or nothing if it is."""
        if self.is_gone() or self.answer.cancelled():
            return "the client has left"
        late = self.deadline < time.monotonic() and not self.begun
        return "its time was over before its turn came" if late else ""

    def put(self, numbers: NDArray[np.int64], part: Prediction) -> None:
        """Take the answers ``part`` to the images with these ``numbers``, which ascend."""
        if len(numbers) == self.size:
            self._prediction = part
            return
        whole = self._prediction
        if whole is None:
            whole = self._prediction = _room_for(self.size, part)
        whole.logits[numbers] = part.logits
        for layer, ids in part.expert_ids.items():
            whole.expert_ids[layer][numbers] = ids
            whole.weights[layer][numbers] = part.weights[layer]
        for layer, margins in part.margins.items():
            whole.margins[layer][numbers] = margins

    def release(self) -> None:
        """Let go of the images and of the answers to some of them: nobody asks for the rest."""
        self.images, self._prediction = self.images[:0].copy(), None

    def end(self, failure: Exception | None) -> None:
        """Hand over the answer or the failure, in the thread of the event loop."""
        if self.answer.done():
            return
        if failure is not None:
            self.answer.set_exception(failure)
        elif self._prediction is not None:
            self.answer.set_result(self._prediction)


class Slice(NamedTuple):
    """Images of one job that are routed together; ``numbers`` are their places in it."""

    job: Job
    numbers: NDArray[np.int64]
    images: NDArray[np.float32]


@dataclass(frozen=True)
class Done:
    """A batch that was computed."""

    answer: Prediction
    seconds: float


@dataclass(frozen=True)
class Piece:
    """Rows of one job that wait at one pathway ``since`` then; ``numbers`` [R] are their places."""

    job: Job
    numbers: NDArray[np.int64]
    rows: Rows
    since: float

    def __getitem__(self, index: slice) -> "Piece":
        return Piece(self.job, self.numbers[index], self.rows[index], self.since)


def _room_for(images: int, part: Prediction) -> Prediction:
    """Return an empty prediction for so many images, of the shapes of ``part``."""

    def room(values: NDArray[Any]) -> NDArray[Any]:
        return np.empty((images, *values.shape[1:]), values.dtype)

    return Prediction(
        room(part.logits),
        {layer: room(ids) for layer, ids in part.expert_ids.items()},
        {layer: room(weights) for layer, weights in part.weights.items()},
        {layer: room(margins) for layer, margins in part.margins.items()},
    )

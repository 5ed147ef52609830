"""Answers of a model, with the routes they took, as plain arrays.

Shapes: N images, R rows of a layer (images, or tokens of each image in turn), C classes, E experts,
K experts per row.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.pruning import DROPPED

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class RouteAnswers:
    """One routed layer: scores [R, E], ids [R, K] best first, weights [R, K]."""

    scores: NDArray[np.float32]
    expert_ids: NDArray[np.int64]
    weights: NDArray[np.float32]

    @property
    def margins(self) -> NDArray[np.float32]:
        """Distance between the last score that was chosen and the first that was not, [R].

        Infinite where no other expert could have been chosen.
        """
        k, experts = self.expert_ids.shape[1], self.scores.shape[1]
        if k == experts:
            return np.full(len(self.scores), np.inf, np.float32)
        best = np.sort(self.scores, axis=1)[:, ::-1]
        with np.errstate(invalid="ignore"):  # infinity less infinity: no number, no clear margin
            margins = best[:, k - 1] - best[:, k]
        return np.where(best[:, k] <= DROPPED / 2, np.float32(np.inf), margins)

    @property
    def expert_load(self) -> tuple[int, ...]:
        """Numbers of rows that experts get; a row counts for each of its experts."""
        load = np.bincount(self.expert_ids.reshape(-1), minlength=self.scores.shape[1])
        return tuple(load.tolist())


@dataclass(frozen=True)
class Answers:
    """Logits [N, C] and, by name and in the order they are met, the layers that route."""

    logits: NDArray[np.float32]
    routes: dict[str, RouteAnswers] = field(default_factory=dict)


def first_images(answers: Answers, count: int) -> Answers:
    """Return the answers to the first ``count`` images."""
    images = len(answers.logits)

    def rows(values: NDArray[Any]) -> NDArray[Any]:
        return values[: count * (len(values) // max(1, images))]

    routes = {
        layer: RouteAnswers(rows(route.scores), rows(route.expert_ids), rows(route.weights))
        for layer, route in answers.routes.items()
    }
    return Answers(answers.logits[:count], routes)

"""What the torch model answers: the truth that every export is compared with.

Shapes: N images, R rows of a layer (images, or tokens of each image in turn), C classes, E experts,
K experts per row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing import Routes, Routing, RoutingRule, Surrogate, choose

# Above any score, and a float32 still: less than it, a score is nothing.
CERTAIN = 1e30

_BATCH = 128

Images = NDArray[np.float32]


@dataclass(frozen=True)
class RouteAnswers:
    """One routed layer: scores [R, E], ids [R, K] best first, weights [R, K]."""

    scores: NDArray[np.float32]
    expert_ids: NDArray[np.int64]
    weights: NDArray[np.float32]

    @property
    def margins(self) -> NDArray[np.float32]:
        """Distance between the last score that was chosen and the first that was not, [R]."""
        k, experts = self.expert_ids.shape[1], self.scores.shape[1]
        if k == experts:
            return np.full(len(self.scores), np.inf, np.float32)
        best = np.sort(self.scores, axis=1)[:, ::-1]
        with np.errstate(invalid="ignore"):  # infinity less infinity: no number, no clear margin
            return np.asarray(best[:, k - 1] - best[:, k])

    @property
    def expert_load(self) -> tuple[int, ...]:
        """How many rows each expert gets; a row counts for each of its experts."""
        load = np.bincount(self.expert_ids.reshape(-1), minlength=self.scores.shape[1])
        return tuple(load.tolist())


@dataclass(frozen=True)
class Answers:
    """Logits [N, C] and, by name and in the order they are met, the layers that route."""

    logits: NDArray[np.float32]
    routes: dict[str, RouteAnswers] = field(default_factory=dict)


def reference_answers(model: Classifier, images: Images) -> Answers:
    """Return what ``model`` answers to float32 images [N, C, H, W] in [0, 1]."""
    return _answers(model, images, Routes)


def preferring_answers(model: Classifier, images: Images, expert: int) -> Answers:
    """Return what ``model`` answers if each layer prefers ``expert``, or its last one.

    Its score is raised above all others, so with top-1 every row goes there.
    """

    def adjust(rule: RoutingRule, scores_NE: Tensor, surrogate: Surrogate | None) -> Routing:
        bonus_E = torch.from_numpy(bonus_for(expert, rule.num_experts))
        return choose(scores_NE + bonus_E, rule, surrogate)

    return _answers(model, images, lambda: Routes(adjust=adjust))


def bonus_for(expert: int, num_experts: int) -> NDArray[np.float32]:
    """Return what to add to the scores [E] so that ``expert``, or the last one, is the best."""
    bonus_E = np.zeros(num_experts, np.float32)
    bonus_E[min(expert, num_experts - 1)] = CERTAIN
    return bonus_E


def _answers(model: Classifier, images: Images, new_routes: Callable[[], Routes]) -> Answers:
    columns: dict[tuple[str, str], list[Tensor]] = {}
    logits = []
    with torch.inference_mode():
        for x_NCHW in torch.split(torch.from_numpy(images), _BATCH):
            routes = new_routes()
            logits.append(model(x_NCHW, routes))
            for layer, routing in routes.taken.items():
                for name in ("scores_NE", "expert_ids_NK", "weights_NK"):
                    columns.setdefault((layer, name), []).append(getattr(routing, name))
    arrays: dict[tuple[str, str], NDArray[Any]] = {
        key: torch.cat(parts).numpy() for key, parts in columns.items()
    }
    layers = dict.fromkeys(layer for layer, _ in arrays)
    return Answers(
        torch.cat(logits).numpy(),
        {
            layer: RouteAnswers(
                arrays[layer, "scores_NE"],
                arrays[layer, "expert_ids_NK"],
                arrays[layer, "weights_NK"],
            )
            for layer in layers
        },
    )

"""What the torch model answers: the truth that every export is compared with.

Shapes: N images, R rows of a layer (images, or tokens of each image in turn), C classes, E experts,
K experts per row.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import Routes, Routing, RoutingRule, Surrogate, choose
from advmoe_deploy.parity.answers import Answers, Images, RouteAnswers
from advmoe_deploy.parity.compare import compare_answers, predictions_of
from advmoe_deploy.parity.tolerance import rounding_of, same_experts
from advmoe_deploy.reports import ParityReport
from advmoe_deploy.runtime.runner import Runner

# Above any score, and a float32 still: less than it, a score is nothing.
CERTAIN = 1e30

_BATCH = 128


def reference_answers(
    model: Classifier, images: NDArray[Any], *, preferred: int | None = None
) -> Answers:
    """Return what ``model`` answers to images [N, C, H, W] in [0, 1].

    With ``preferred``, each layer prefers that expert, or its last: the score is raised above all
    others, so that with top-1 every row goes there. A dropped expert stays dropped.
    """
    if preferred is None:
        return _answers(model, images, Routes)

    def adjust(rule: RoutingRule, scores_NE: Tensor, surrogate: Surrogate | None) -> Routing:
        bonus_E = torch.from_numpy(bonus_for(preferred, rule.num_experts))
        bonus_E[list(rule.dropped)] = 0
        return choose(scores_NE + bonus_E, rule, surrogate)

    return _answers(model, images, lambda: Routes(adjust=adjust))


def compare_with_reference(
    model: Classifier,
    runner: Runner,
    images: Images,
    *,
    rounding: float = 0.0,
    data: str | None = None,
) -> ParityReport:
    """Return how ``runner`` and ``model`` compare on float32 images [N, C, H, W] in [0, 1].

    ``rounding`` is the model's own; ``data`` says where the images come from.
    """
    answer = predictions_of(runner, images)
    reference = reference_answers(model, images)
    return compare_answers(reference, answer, rounding=rounding, data=data)


class Reference:
    """A model, and the same in float64: how far apart they are is what float32 cannot tell."""

    def __init__(self, model: Classifier) -> None:
        self.model = model
        self._exact = copy.deepcopy(model).double()

    def answers(self, images: Images, *, preferred: int | None = None) -> Answers:
        """Return what the model answers, see :func:`reference_answers`."""
        return reference_answers(self.model, images, preferred=preferred)

    def rounding(self, images: Images, *, preferred: int | None = None) -> float:
        """Return the largest difference float32 makes to logits, over images routed alike."""
        answers = self.answers(images, preferred=preferred)
        exact = reference_answers(self._exact, images.astype(np.float64), preferred=preferred)
        alike_N = np.ones(len(images), dtype=bool)
        for layer, route in answers.routes.items():
            alike_R = same_experts(exact.routes[layer].expert_ids, route.expert_ids)
            alike_N &= alike_R.reshape(len(images), -1).all(axis=1)
        return rounding_of(answers.logits[alike_N], exact.logits[alike_N])


def bonus_for(expert: int, num_experts: int) -> NDArray[np.float32]:
    """Return what to add to the scores [E] so that ``expert``, or the last one, is the best."""
    bonus_E = np.zeros(num_experts, np.float32)
    bonus_E[min(expert, num_experts - 1)] = CERTAIN
    return bonus_E


def _answers(model: Classifier, images: NDArray[Any], new_routes: Callable[[], Routes]) -> Answers:
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

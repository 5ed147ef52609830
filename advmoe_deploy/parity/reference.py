"""Reference answers of the torch model, with which every export is compared.

Shapes: N images, R rows of a layer (images, or tokens of each image in turn), C classes, E experts,
K experts per row.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import Routes, Routing, RoutingRule, Surrogate, choose
from advmoe_deploy.parity.answers import Answers, Images, RouteAnswers, first_images
from advmoe_deploy.parity.compare import BATCH, CLOSE_CALL
from advmoe_deploy.parity.rounding import DRAWS, disturb
from advmoe_deploy.parity.tolerance import error_of, margin_for, rounding_of, same_experts
from advmoe_deploy.pruning import DROPPED

# Above any score, and a float32 still: less than it, a score is nothing.
CERTAIN = 1e30

# Images that the disturbed model answers: it says how large roundings are, not where.
_DISTURBED_IMAGES = 8


def reference_answers(
    model: Classifier,
    images: NDArray[Any],
    *,
    preferred: int | None = None,
    passed: Callable[[], None] | None = None,
) -> Answers:
    """Return what ``model`` answers to images [N, C, H, W] in [0, 1].

    They are taken in batches; ``passed`` hears of each.

    With ``preferred``, each layer prefers that expert, or its last: the score is raised above all
    others, so that with top-1 every row goes there. A dropped expert stays dropped.
    """
    if preferred is None:
        return _answers(model, images, Routes, passed)

    def adjust(rule: RoutingRule, scores_NE: Tensor, surrogate: Surrogate | None) -> Routing:
        bonus_E = torch.from_numpy(bonus_for(preferred, rule.num_experts))
        bonus_E[list(rule.dropped)] = 0
        return choose(scores_NE + bonus_E, rule, surrogate)

    return _answers(model, images, lambda: Routes(adjust=adjust), passed)


@dataclass(frozen=True)
class Uncertainty:
    """Distance of a model in float32 from itself in float64.

    ``rounding`` is the largest difference of logits and routing weights, relative to a row's
    largest where that exceeds 1, and ``scores`` that of scores as they are, both over images that
    are routed alike.
    """

    rounding: float
    scores: float = 0.0

    @property
    def margin(self) -> float:
        """Margin of the best scores below which another processor may choose the other expert."""
        return margin_for(self.scores, least=CLOSE_CALL)


class Reference:
    """A model, and the same in float64: how far apart they are is what float32 cannot tell."""

    def __init__(self, model: Classifier) -> None:
        self.model = model
        self._exact = copy.deepcopy(model).double()

    def answers(self, images: Images, *, preferred: int | None = None) -> Answers:
        """Return what the model answers, see :func:`reference_answers`."""
        return reference_answers(self.model, images, preferred=preferred)

    def uncertainty(self, images: Images, *, preferred: int | None = None) -> Uncertainty:
        """Return the larger of what float32 costs here and, on a few images, on any processor."""
        exact = self._exact_answers(images, preferred)
        found = [_difference(self.answers(images, preferred=preferred), exact)]
        few = images[:_DISTURBED_IMAGES]
        for draw in DRAWS:
            disturb(self._exact.parameters(), draw)
            try:
                elsewhere = self._exact_answers(few, preferred)
            finally:
                self._exact.load_state_dict(self.model.state_dict())
            found.append(_difference(elsewhere, first_images(exact, len(few))))
        return Uncertainty(max(u.rounding for u in found), max(u.scores for u in found))

    def rounding(self, images: Images, *, preferred: int | None = None) -> float:
        """Return by how much logits and routing weights are uncertain, see :class:`Uncertainty`."""
        return self.uncertainty(images, preferred=preferred).rounding

    def _exact_answers(self, images: Images, preferred: int | None) -> Answers:
        return reference_answers(self._exact, images.astype(np.float64), preferred=preferred)


def _difference(answers: Answers, exact: Answers) -> Uncertainty:
    images = len(exact.logits)
    alike_N = np.ones(images, dtype=bool)
    for layer, route in answers.routes.items():
        alike_R = same_experts(exact.routes[layer].expert_ids, route.expert_ids)
        alike_N &= alike_R.reshape(images, -1).all(axis=1)
    rounding, scores = rounding_of(answers.logits[alike_N], exact.logits[alike_N]), 0.0
    for layer, route in answers.routes.items():
        right = exact.routes[layer]
        alike_R = np.repeat(alike_N, len(right.scores) // max(1, images))
        weights = (np.sort(each.weights[alike_R], axis=1) for each in (route, right))
        rounding = max(rounding, rounding_of(*weights))
        kept_RE = alike_R[:, None] & (right.scores > DROPPED / 2)
        scores = max(scores, error_of(route.scores[kept_RE], right.scores[kept_RE]))
    return Uncertainty(rounding, scores)


def bonus_for(expert: int, num_experts: int) -> NDArray[np.float32]:
    """Return what to add to the scores [E] so that ``expert``, or the last one, is the best."""
    bonus_E = np.zeros(num_experts, np.float32)
    bonus_E[min(expert, num_experts - 1)] = CERTAIN
    return bonus_E


def _answers(
    model: Classifier,
    images: NDArray[Any],
    new_routes: Callable[[], Routes],
    passed: Callable[[], None] | None,
) -> Answers:
    columns: dict[tuple[str, str], list[Tensor]] = {}
    logits = []
    with torch.inference_mode():
        for x_NCHW in torch.split(torch.from_numpy(images), BATCH):
            routes = new_routes()
            logits.append(model(x_NCHW, routes))
            for layer, routing in routes.taken.items():
                for name in ("scores_NE", "expert_ids_NK", "weights_NK"):
                    columns.setdefault((layer, name), []).append(getattr(routing, name))
            if passed:
                passed()
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

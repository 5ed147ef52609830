"""One batch under attack, and what its clean images tell about the model.

Shapes: N images, C channels, H height, W width, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from advmoe_deploy.attacks.soft import route_gap
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import Routes, Routing

# A goal is reached when it is by this share of what is usual.
_GOAL = 0.01


@dataclass(frozen=True)
class Scene:
    """Clean images of one batch, their labels, and the model's logits and routings."""

    model: Classifier
    images_NCHW: Tensor
    labels_N: Tensor
    logits_NK: Tensor
    routings: Mapping[str, Routing]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Classifier, images_NCHW: Tensor, labels_N: Tensor) -> Self:
        """Return the scene of a batch."""
        routes = Routes()
        logits_NK = model(images_NCHW, routes)
        return cls(model, images_NCHW, labels_N, logits_NK, routes.taken)

    @property
    def error_goal(self) -> float:
        """Lead that a wrong class has to have, in logits."""
        spread_N = self.logits_NK.amax(dim=1) - self.logits_NK.amin(dim=1)
        return _GOAL * float(spread_N.median())

    @property
    def route_goal(self) -> float:
        """Lead that a route has to have, in scores."""
        return _GOAL * min(map(route_gap, self.routings.values()))

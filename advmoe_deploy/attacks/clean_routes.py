"""The routes of clean images, held fixed while the images are attacked (RA-E)."""

import torch
from torch import Tensor

from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import Routes, Routing


class CleanRoutes:
    """Decisions of every routed layer for one batch, to be forced on its attacked rows.

    Shapes: N images, T routed rows per image (1, or its tokens), E experts, K experts per row.
    """

    @torch.no_grad()
    def __init__(self, model: Classifier, images_NCHW: Tensor) -> None:
        self._taken = model.route(images_NCHW)
        self._images = len(images_NCHW)

    def of(self, rows_N: Tensor) -> Routes:
        """Return routes for the images ``rows_N`` of the batch, weights included."""
        return Routes(
            {layer: take_images(r, rows_N, self._images) for layer, r in self._taken.items()}
        )


def take_images(routing: Routing, rows_N: Tensor, images: int) -> Routing:
    """Return the part of ``routing``, which is of ``images`` images, that belongs to ``rows_N``."""

    def part(values: Tensor) -> Tensor:
        return values.view(images, -1, values.shape[1])[rows_N].flatten(0, 1)

    return Routing(part(routing.scores_NE), part(routing.expert_ids_NK), part(routing.weights_NK))

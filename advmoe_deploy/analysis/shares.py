"""Measured shares with their confidence intervals, and batches to measure on."""

import torch
from torch import Tensor

from advmoe_deploy.attacks.pgd import eval_mode
from advmoe_deploy.attacks.white_box import BATCH
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import Routes, Routing
from advmoe_deploy.parity.intervals import wilson_interval
from advmoe_deploy.specs import Frozen


class Share(Frozen):
    """A share in [0, 1] of some images, with its 95 % Wilson interval."""

    value: float
    low: float
    high: float


def share_of(hits_N: Tensor) -> Share:
    """Return the share of rows that are true."""
    hits, total = int(hits_N.sum()), len(hits_N)
    low, high = wilson_interval(hits, total)
    return Share(value=hits / total, low=low, high=high)


def answers(
    model: Classifier, images: Tensor, routes: Routes | None = None
) -> tuple[Tensor, dict[str, Routing]]:
    """Return logits [N, K] and the routing of every layer over all ``images``, in eval mode.

    ``routes``, which overrule the model's own, must not depend on the images.
    """
    logits, taken = [], []
    with eval_mode(model), torch.no_grad():
        for x in torch.split(images, BATCH):
            own = Routes(routes.forced, adjust=routes.adjust) if routes else Routes()
            logits.append(model(x, own))
            taken.append(own.taken)
    return torch.cat(logits), {layer: _joined([t[layer] for t in taken]) for layer in taken[0]}


def fold_rows(values: Tensor, images: int) -> Tensor:
    """Return per-row ``values`` [N * T, ...] as [N, T, ...]; T is 1 where images are routed."""
    return values.view(images, -1, *values.shape[1:])


def _joined(parts: list[Routing]) -> Routing:
    return Routing(
        torch.cat([part.scores_NE for part in parts]),
        torch.cat([part.expert_ids_NK for part in parts]),
        torch.cat([part.weights_NK for part in parts]),
    )

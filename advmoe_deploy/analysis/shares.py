"""Measured shares with their confidence intervals, and batches to measure on."""

import torch
from torch import Tensor

from advmoe_deploy.attacks.batches import batch_size
from advmoe_deploy.attacks.pgd import eval_mode
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import Routes, Routing
from advmoe_deploy.parity.intervals import paired_difference_interval, wilson_interval
from advmoe_deploy.specs import Frozen


class Share(Frozen):
    """A share in [0, 1] of some images, with its 95 % Wilson interval."""

    value: float
    low: float
    high: float


class Marked(Share):
    """A share that says of which images: ``marks`` has a 1 or a 0 for each, in order."""

    marks: str


class Difference(Frozen):
    """Difference of two shares of the same images, the first less the second.

    ``low`` and ``high`` are its paired 95 % interval: two shares may differ beyond chance although
    their own intervals overlap, for the same images are hard for both.
    """

    value: float
    low: float
    high: float


def marked(hits_N: Tensor) -> Marked:
    """Return the share of rows that are true, and which they are."""
    marks = "".join(str(int(hit)) for hit in hits_N.tolist())
    return Marked(**share_of(hits_N).model_dump(), marks=marks)


def difference_of(first: Marked, second: Marked) -> Difference:
    """Return how much larger ``first`` is than ``second``, of the same images."""
    pairs = list(zip(first.marks, second.marks, strict=True))
    only_first, only_second = pairs.count(("1", "0")), pairs.count(("0", "1"))
    low, high = paired_difference_interval(only_first, only_second, len(pairs))
    return Difference(value=first.value - second.value, low=low, high=high)


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
        for x in torch.split(images, batch_size(images)):
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

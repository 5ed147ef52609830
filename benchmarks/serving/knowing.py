"""An attack that knows the route monitor: it fools the model and looks like the clean image to it.

Until an image fools, its error is raised; from then on, its figures (the experts, the margins of
routes and of classes) are brought back to those of the clean image. Of all iterates that fool, the
one is kept whose figures are nearest. Margins are what the monitor sees: shares, not scores.

Shapes: N images, K classes, E experts, R rows of a layer.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.attacks.losses import is_wrong, lead_over_label
from advmoe_deploy.attacks.pgd import Ascent, pgd_search, random_start, unit
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import Routes, Routing
from advmoe_deploy.specs import ThreatModel

STEPS = 200
# How much the figures weigh against the error once an image fools, in turn; and how far a wrong
# class has to lead before the error no longer counts.
WEIGHTS = (0.5, 1.0, 2.0)
LEAD = 0.05


def knowing_attack(
    model: Classifier, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int = 0
) -> Tensor:
    """Return the best of one search for each of the ``WEIGHTS``, image by image."""
    generator = torch.Generator().manual_seed(seed)
    best, found_N = images.clone(), torch.full((len(images),), -torch.inf)
    with torch.no_grad():
        taken = Routes()
        logits = model(images, taken)
    for weight in WEIGHTS:
        objective = _Knowing(model, logits, dict(taken.taken), weight)
        tried = pgd_search(
            objective,
            images,
            labels,
            random_start(images, threat.epsilon, generator),
            rows_N=torch.arange(len(images)),
            threat=threat,
            step_sizes=[threat.epsilon * (1 - step / STEPS) / 2 for step in range(STEPS)],
        )
        ascent = objective(tried, labels, torch.arange(len(images)))
        # What fools counts before what looks well.
        value_N = ascent.loss_N + 100.0 * ascent.fooled_N
        better = value_N > found_N
        best[better], found_N[better] = tried[better], value_N[better]
    return best


class _Knowing:
    """Error first, and then the figures of the clean images, whose loss is how far they are."""

    def __init__(
        self, model: Classifier, logits_NK: Tensor, clean: dict[str, Routing], weight: float
    ) -> None:
        self.model, self.weight, self.clean = model, weight, clean
        self.margins = {
            layer: _margins(each.scores_NE).view(len(logits_NK), -1)
            for layer, each in clean.items()
        }
        self.ids = {
            layer: each.expert_ids_NK[:, 0].view(len(logits_NK), -1)
            for layer, each in clean.items()
        }
        self.class_margin_N = _margins(logits_NK)

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, rows_N: Tensor, /) -> Ascent:
        x = images_NCHW.detach().requires_grad_(True)
        routes = Routes(surrogate="probability")
        with torch.enable_grad():
            logits_NK = self.model(x, routes)
            error_N = lead_over_label(logits_NK, labels_N)
            far_N = self._distance(logits_NK, routes, rows_N)
            (raise_error,) = torch.autograd.grad(error_N.sum(), x, retain_graph=True)
            (go_far,) = torch.autograd.grad(far_N.sum(), x)
        leads_N = (error_N > LEAD)[:, None, None, None]
        direction = unit(raise_error).masked_fill(leads_N, 0.0)
        direction = direction - self.weight * unit(go_far) * leads_N
        return Ascent(direction, -far_N.detach(), is_wrong(logits_NK.detach(), labels_N))

    def _distance(self, logits_NK: Tensor, routes: Routes, rows_N: Tensor) -> Tensor:
        far_N = (_margins(logits_NK) - self.class_margin_N[rows_N]).abs()
        for layer, taken in routes.taken.items():
            margins = _margins(taken.scores_NE).view(len(rows_N), -1)
            far_N = far_N + (margins - self.margins[layer][rows_N]).abs().mean(dim=1)
            ids_R = self.ids[layer][rows_N].reshape(-1)
            away_R = F.relu(lead_over_label(taken.scores_NE, ids_R) + 1e-3)
            far_N = far_N + away_R.view(len(rows_N), -1).mean(dim=1)
        return far_N


def _margins(scores_RE: Tensor) -> Tensor:
    best_R2 = F.softmax(scores_RE, dim=1).topk(2, dim=1).values
    return best_R2[:, 0] - best_R2[:, 1]

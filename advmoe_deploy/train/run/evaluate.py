"""Accuracy, robust accuracy and use of the experts on one split, shared among the processes.

Each process draws the random starts of its own share, so that a measurement, unlike training,
depends on their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from torch import Tensor

from advmoe_deploy.attacks.batches import labelled_batches
from advmoe_deploy.attacks.pgd import eval_mode
from advmoe_deploy.attacks.route_aware import route_aware, withstanding
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import Routes
from advmoe_deploy.plan import effective_routes
from advmoe_deploy.progress import Progress
from advmoe_deploy.specs import AttackSpec, ThreatModel

# Choices per expert, by routed layer.
ExpertLoad = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Measured:
    """Measurements on one split. ``expert_load`` counts clean rows; empty for a dense model."""

    images: int
    clean_correct: int
    pgd_correct: int
    robust_correct: int
    expert_load: ExpertLoad

    @property
    def clean_accuracy(self) -> float:
        """Share of clean images that are right."""
        return self.clean_correct / self.images

    @property
    def pgd_accuracy(self) -> float:
        """Share of images that are right and that the attack on the model as it runs left so."""
        return self.pgd_correct / self.images

    @property
    def robust_accuracy(self) -> float:
        """Share of images that are right and that no attack turned, those on routes included."""
        return self.robust_correct / self.images

    @property
    def effective_routes(self) -> float | None:
        """Effective number of experts in use, of the layer with the fewest; dense: ``None``."""
        return min(map(effective_routes, self.expert_load.values()), default=None)


def together(parts: Sequence[Measured]) -> Measured:
    """Return the measurements on splits as one on all of them."""
    loads = [part.expert_load for part in parts]
    return Measured(
        images=sum(part.images for part in parts),
        clean_correct=sum(part.clean_correct for part in parts),
        pgd_correct=sum(part.pgd_correct for part in parts),
        robust_correct=sum(part.robust_correct for part in parts),
        expert_load={
            layer: tuple(map(sum, zip(*(load[layer] for load in loads), strict=True)))
            for layer in loads[0]
        },
    )


def measure(
    fabric: Fabric,
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    attack: AttackSpec,
    progress: Progress,
) -> Measured:
    """Return what ``model`` reaches on float ``images``; each process attacks its own share.

    ``attack`` is on the model as it runs; one that routes is attacked by its pathways as well.
    """
    mine = slice(fabric.global_rank, None, fabric.world_size)
    x, y = images[mine], labels[mine]
    clean, loads = _clean(model, x, y)
    standing = withstanding(model, x, y, threat, route_aware(model, attack), progress)
    pgd, robust = standing[0].sum(), standing[-1].sum()
    counts = torch.cat([torch.stack([clean, pgd, robust]), *loads])
    summed = fabric.all_reduce(counts, reduce_op="sum")
    assert isinstance(summed, Tensor)
    clean_correct, pgd_correct, robust_correct, *load = summed.tolist()
    expert_load = {}
    for rule in model.rules:
        expert_load[rule.layer] = tuple(load[: rule.num_experts])
        load = load[rule.num_experts :]
    return Measured(len(labels), clean_correct, pgd_correct, robust_correct, expert_load)


def _clean(model: Classifier, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return how many clean images are right, and the load of each routed layer."""
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    loads = [correct.new_zeros(rule.num_experts) for rule in model.rules]
    with eval_mode(model), torch.no_grad():
        # A process may have none of a small split, and some models take no empty batch.
        for images, labels in labelled_batches(x, y) if len(x) else ():
            routes = Routes()
            correct += (model(images, routes).argmax(dim=1) == labels).sum()
            for rule, load in zip(model.rules, loads, strict=True):
                load += routes.taken[rule.layer].expert_load_E
    return correct, loads

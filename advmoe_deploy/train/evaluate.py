"""Accuracy, robust accuracy and use of the experts on one split, shared among the processes."""

import math
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from torch import Tensor

from advmoe_deploy.attacks.pgd import eval_mode
from advmoe_deploy.attacks.white_box import BATCH, attack_model, predict
from advmoe_deploy.models.advmoe import ROUTER, AdvMoE
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.specs import AttackSpec, ThreatModel


@dataclass(frozen=True)
class Measured:
    """What one split gave. ``expert_load`` counts clean images; empty for a dense model."""

    images: int
    clean_correct: int
    robust_correct: int
    expert_load: tuple[int, ...]

    @property
    def clean_accuracy(self) -> float:
        """Share of clean images that are right."""
        return self.clean_correct / self.images

    @property
    def robust_accuracy(self) -> float:
        """Share of images that are right and that the attack did not turn."""
        return self.robust_correct / self.images

    @property
    def effective_routes(self) -> float | None:
        """Effective number of experts in use, ``None`` for a dense model."""
        return effective_routes(self.expert_load) if self.expert_load else None


def effective_routes(expert_load: tuple[int, ...]) -> float:
    """Return exp of the entropy of the load: E when all are used alike, 1 at a collapse."""
    total = sum(expert_load)
    shares = [rows / total for rows in expert_load if rows]
    return math.exp(-sum(share * math.log(share) for share in shares))


def measure(
    fabric: Fabric,
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    attack: AttackSpec,
) -> Measured:
    """Return what ``model`` reaches on float ``images``; each process attacks its own share."""
    mine = slice(fabric.global_rank, None, fabric.world_size)
    x, y = images[mine], labels[mine]
    clean = (predict(model, x) == y).sum()
    found = attack_model(model, x, y, threat, attack, first_only=True)
    robust = (predict(model, found) == y).sum()
    counts = torch.stack([clean, robust, *_load(model, x)])
    summed = fabric.all_reduce(counts, reduce_op="sum")
    assert isinstance(summed, Tensor)
    clean_correct, robust_correct, *load = summed.tolist()
    return Measured(len(labels), clean_correct, robust_correct, tuple(load))


def _load(model: Classifier, images: Tensor) -> list[Tensor]:
    if not isinstance(model, AdvMoE):
        return []
    with eval_mode(model), torch.no_grad():
        loads = [model.route(batch)[ROUTER].expert_load_E for batch in torch.split(images, BATCH)]
    return list(torch.stack(loads).sum(dim=0))

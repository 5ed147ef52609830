"""Terms for routers in training: noise, capacity, and losses over the whole batch's routes.

The losses are no means over rows, so each process computes them from the rows of all.

Shapes: N images, E experts.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.models.routing.capacity import Adjust
from advmoe_deploy.models.routing.routing import Routing
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.data.loader import Part
from advmoe_deploy.train.distributed.collectives import all_gathered
from advmoe_deploy.train.objectives.balance import BALANCE_LOSSES
from advmoe_deploy.train.objectives.forward import Adjustment
from advmoe_deploy.train.objectives.losses import class_routing_loss


def adjustment(config: TrainConfig, part: Part) -> Adjustment | None:
    """Return the noise and the capacity of a training step, ``None`` without either.

    Capacity counts the rows that a layer is given in one pass, those of this process.
    """
    if not config.gate_noise and config.capacity_factor is None:
        return None

    def of_pass(images: int) -> Adjust:
        copies = images // len(part.images)
        return Adjust(
            noise=config.gate_noise,
            capacity_factor=config.capacity_factor,
            overflow=config.capacity_overflow,
            normal=partial(part.rng.normal_scores, copies=copies),
        )

    return of_pass


def balance(name: str, taken: Sequence[Routing]) -> Tensor:
    """Return the balancing loss of this name, its mean over the routed layers."""
    losses = [BALANCE_LOSSES[name](_whole(routing)) for routing in taken]
    return torch.stack(losses).mean()


def class_routing(model: AdvMoE, part: Part, attacked: Tensor) -> Tensor:
    """Return the class routing loss over the clean images and over those that attack the router."""
    scores_2NE = model.score(torch.cat([part.images, attacked]))
    labels_2N = part.labels.repeat(2)
    return class_routing_loss(
        all_gathered(scores_2NE), all_gathered(labels_2N), model.spec.num_classes
    )


def _whole(routing: Routing) -> Routing:
    """Return the routing of the rows of all processes."""
    rows = {field.name: getattr(routing, field.name) for field in fields(routing)}
    tensors = {
        name: all_gathered(value) for name, value in rows.items() if isinstance(value, Tensor)
    }
    return replace(routing, **tensors)

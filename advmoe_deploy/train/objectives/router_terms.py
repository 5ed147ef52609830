"""Terms for routers in training: noise, capacity, and losses over the whole batch's routes.

The losses are no means over rows, so each process computes them from the rows of all.

Shapes: N images, E experts.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from advmoe_deploy.attacks.pgd import eval_mode
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.models.routing.balance import BALANCE_LOSSES
from advmoe_deploy.models.routing.capacity import Adjust
from advmoe_deploy.models.routing.routing import Routing, forced_route
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.data.loader import BatchPart
from advmoe_deploy.train.distributed.collectives import all_gathered
from advmoe_deploy.train.objectives.forward import Adjustment, Forced
from advmoe_deploy.train.objectives.losses import class_routing_loss, divergence


def adjustment(config: TrainConfig, part: BatchPart) -> Adjustment | None:
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


def random_routes(model: Classifier, part: BatchPart, share: float) -> Forced:
    """Return routes that send this share of the images to random experts, and the others as usual.

    An image takes the same expert in every pass, attacked or clean.
    """
    (rule,) = model.rules
    drawn_N2 = part.rng.uniform(part.images[:, 0, 0, :2]).add(1).div(2)
    ids_N = (drawn_N2[:, 0] * rule.num_experts).long().clamp(max=rule.num_experts - 1)
    if share < 1:
        with torch.no_grad(), eval_mode(model):
            usual_N = model.route(part.images)[rule.layer].expert_ids_NK[:, 0]
        ids_N = torch.where(drawn_N2[:, 1] < share, ids_N, usual_N)

    def of_pass(x_NCHW: Tensor) -> dict[str, Routing]:
        copies = len(x_NCHW) // len(ids_N)
        return {rule.layer: forced_route(ids_N.repeat(copies), rule.num_experts, like=x_NCHW)}

    return of_pass


def score_terms(config: TrainConfig, model: AdvMoE, part: BatchPart, attacked: Tensor) -> Tensor:
    """Return the terms on the scores of clean images and of those that attack the router."""
    scores_2NE = model.score(torch.cat([part.images, attacked]))
    clean_NE, attacked_NE = scores_2NE.chunk(2)
    term = config.route_stability * divergence(clean_NE, attacked_NE) * part.share / part.weight
    if config.class_routing_weight:
        labels_2N = part.labels.repeat(2)
        by_class = class_routing_loss(
            all_gathered(scores_2NE), all_gathered(labels_2N), model.spec.num_classes
        )
        term = term + config.class_routing_weight * by_class
    return term


def _whole(routing: Routing) -> Routing:
    """Return the routing of the rows of all processes."""
    rows = {field.name: getattr(routing, field.name) for field in fields(routing)}
    tensors = {
        name: all_gathered(value) for name, value in rows.items() if isinstance(value, Tensor)
    }
    return replace(routing, **tensors)

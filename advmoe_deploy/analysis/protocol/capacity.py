"""Batch-prioritised evaluation: what is left of a model whose experts have little room.

Riquelme et al., NeurIPS 2021 (arXiv 2106.05974): an expert takes at most ceil(ratio * N * K / E)
rows of a batch, and those that their router is surest of are served first. A token that finds no
room keeps its residual, and costs nothing; where a row has no residual (any family but vit-moe), it
goes to the next best expert with room (Robust Experts, arXiv 2509.05086).

An answer then depends on who else is in the batch: this is for looking at a model, and no exported
one is limited so.

Shapes: N rows, E experts that are not dropped, K experts per row.
"""

import torch
from torch import Tensor

from advmoe_deploy.analysis.protocol.radii import Protocol, withstanding
from advmoe_deploy.analysis.shares import Share, answers, share_of
from advmoe_deploy.attacks.batches import batch_size
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.macs import count_macs
from advmoe_deploy.models.routing.capacity import Adjust, Overflow
from advmoe_deploy.models.routing.routing import Routes, Routing, RoutingRule, choose
from advmoe_deploy.models.stored import StoredModel
from advmoe_deploy.progress import Progress, task
from advmoe_deploy.specs import Frozen, ThreatModel

_RATIOS: dict[Overflow, tuple[float, ...]] = {
    "drop": (0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
    "reassign": (1.0, 1.25, 1.5, 2.0),
}


class CapacityPoint(Frozen):
    """The model at one capacity ratio.

    ``served`` is the share of choices on clean images that found room where they wanted to go,
    ``macs`` the mean multiply-accumulates of an image, the router counted.
    """

    ratio: float
    served: float
    macs: float
    accuracy: Share
    robust_accuracy: Share


class DensePoint(Frozen):
    """The dense twin, which has no capacity."""

    model: str
    macs: int
    accuracy: Share
    robust_accuracy: Share


class CapacityReport(Frozen):
    """Accuracy against capacity, attacked at ``epsilon`` as it answers: in the same batches.

    ``batch`` images share the room of an expert; the last batch may have fewer. ``macs`` is what an
    image costs without a limit.
    """

    overflow: Overflow
    batch: int
    epsilon: float
    steps: int
    macs: int
    points: tuple[CapacityPoint, ...]
    twin: DensePoint | None


class CapacityLimited(Classifier):
    """``model`` whose experts have room for a share of a batch, the surest rows first."""

    shares_batch = True

    def __init__(self, model: Classifier, ratio: float) -> None:
        super().__init__(model.spec)
        self.model = model
        self.rules = model.rules
        self.adjust = Adjust(capacity_factor=ratio, overflow=overflow_of(model), prioritised=True)

    def forward(self, images: Tensor, routes: Routes | None = None) -> Tensor:
        """Return logits [N, classes]; the images of the batch share the experts' room."""
        asked = routes or Routes()
        limited = Routes(
            asked.forced,
            surrogate=asked.surrogate,
            execution=asked.execution,
            adjust=self.adjust,
        )
        logits: Tensor = self.model(images, limited)
        asked.taken = limited.taken
        return logits


def overflow_of(model: Classifier) -> Overflow:
    """Return what becomes of a row whose expert is full: only tokens can do without one."""
    return "drop" if model.spec.family == "vit-moe" else "reassign"


def ratios_of(model: Classifier, protocol: Protocol) -> tuple[float, ...]:
    """Return the capacity ratios to look at, ascending."""
    return tuple(sorted(protocol.capacities or _RATIOS[overflow_of(model)]))


def require_capacities(stored: StoredModel, ratios: tuple[float, ...]) -> None:
    """Raise :class:`UsageError` if at one of ``ratios`` rows would be left without an answer."""
    if ratios and min(ratios) < 1 and overflow_of(stored.model) == "reassign":
        raise UsageError(
            f"capacity {min(ratios):g} leaves images of family {stored.model.spec.family} without "
            "an expert; give 1 or more (below 1 is for vit-moe, whose tokens keep their residual)"
        )


def over_capacities(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    protocol: Protocol,
    progress: Progress,
) -> CapacityReport:
    """Return accuracy, clean and under attack, of a routed ``model`` at each capacity ratio."""
    ratios = ratios_of(model, protocol)
    whole, saved = _costs(model)
    twin = None
    with task(progress, "capacity", len(ratios) + (protocol.twin is not None)):
        points = []
        for ratio in ratios:
            limited = CapacityLimited(model, ratio)
            served, computed = _served(limited, images)
            clean, robust = _accuracies(limited, images, labels, threat, protocol, progress)
            points.append(
                CapacityPoint(
                    ratio=ratio,
                    served=served,
                    macs=whole - saved * (1 - computed),
                    accuracy=clean,
                    robust_accuracy=robust,
                )
            )
            progress.advance("capacity", robust_accuracy=robust.value)
        if protocol.twin is not None:
            dense = protocol.twin.model
            clean, robust = _accuracies(dense, images, labels, threat, protocol, progress)
            twin = DensePoint(
                model=str(protocol.twin.path),
                macs=count_macs(dense)[0],
                accuracy=clean,
                robust_accuracy=robust,
            )
            progress.advance("capacity", robust_accuracy=robust.value)
    return CapacityReport(
        overflow=overflow_of(model),
        batch=min(batch_size(images), len(labels)),
        epsilon=threat.epsilon,
        steps=protocol.steps,
        macs=whole,
        points=tuple(points),
        twin=twin,
    )


def _accuracies(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    protocol: Protocol,
    progress: Progress,
) -> tuple[Share, Share]:
    """Return accuracy, clean and attacked."""
    clean = share_of(predict(model, images) == labels)
    robust_N = withstanding(model, images, labels, threat, protocol, progress)
    return clean, share_of(robust_N)


def _costs(model: Classifier) -> tuple[int, int]:
    """Return what an image costs, and how much of it is the chosen experts' own work."""
    chosen, all_experts = count_macs(model)[0], count_macs(model, "masked")[0]
    left = model.spec.num_experts - model.spec.top_k
    return chosen, (all_experts - chosen) * model.spec.top_k // left if left else 0


def _served(limited: CapacityLimited, images: Tensor) -> tuple[float, float]:
    """Return which share of choices got the expert they wanted, and which got any."""
    _, taken = answers(limited.model, images, Routes(adjust=limited.adjust))
    rules = {rule.layer: rule for rule in limited.rules}
    found = [_found_room(rules[layer], routing) for layer, routing in taken.items()]
    wanted, any_ = (torch.cat([pair[i].flatten() for pair in found]) for i in (0, 1))
    return float(wanted.double().mean()), float(any_.double().mean())


def _found_room(rule: RoutingRule, routing: Routing) -> tuple[Tensor, Tensor]:
    """Return for each choice [N, K] whether it is one the row wanted, and whether it counts."""
    counts_NK = routing.weights_NK > 0
    own_NK = choose(routing.scores_NE, rule).expert_ids_NK
    wanted_NK = (routing.expert_ids_NK[:, :, None] == own_NK[:, None, :]).any(dim=2)
    return wanted_NK & counts_NK, counts_NK

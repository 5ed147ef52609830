"""Accuracy, routes and redundancy as the radius grows: the protocol of V-MoE's robustness study.

Puigcerver et al., NeurIPS 2022 (arXiv 2210.10253): forty signed steps of a fortieth of the radius,
from the image as it is, on the loss alone and on the loss with V-MoE's auxiliary loss, beside a
dense network at the compute of one expert. There the last step counts; here the worst image that
was met does, so that accuracy is no higher. Any MoE can be looked at so.

Shapes: N images, E experts.
"""

from dataclasses import dataclass

from torch import Tensor

from advmoe_deploy.analysis.redundancy import disagreement, second_experts
from advmoe_deploy.analysis.routing_change import AttackEffect, effect_between
from advmoe_deploy.analysis.shares import Share, share_of
from advmoe_deploy.attacks.effort import attack_task
from advmoe_deploy.attacks.white_box import attack_model, predict
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.macs import count_macs
from advmoe_deploy.models.stored import StoredModel
from advmoe_deploy.progress import Progress, task
from advmoe_deploy.specs import AttackSpec, AttackTarget, Frozen, ThreatModel

RADII = tuple(step / 255 for step in (1, 2, 4, 8, 12, 16, 20))
TARGETS: tuple[AttackTarget, ...] = ("model", "auxiliary")


@dataclass(frozen=True)
class Protocol:
    """How V-MoE's study attacks, where, and beside what.

    ``capacities`` are ratios of :mod:`~advmoe_deploy.analysis.protocol.capacity`, none for those
    that its family allows. ``twin`` is a dense model of the same images and classes.
    """

    steps: int = 40
    radii: tuple[float, ...] = RADII
    capacities: tuple[float, ...] = ()
    twin: StoredModel | None = None
    seed: int = 0

    def attack(self, threat: ThreatModel, target: AttackTarget = "model") -> AttackSpec:
        """Return PGD that reaches the radius in its last step, without a random start."""
        return AttackSpec(
            name="pgd",
            target=target,
            steps=self.steps,
            step_size=threat.epsilon / self.steps,
            random_start=False,
            seed=self.seed,
        )

    def require_twin(self, stored: StoredModel) -> None:
        """Raise :class:`UsageError` if the twin is no dense network for what ``stored`` is for."""
        if self.twin is None:
            return
        if self.twin.model.rules:
            raise UsageError(f"the twin {self.twin.path} routes, too; give a dense run")
        ours, theirs = stored.model.spec.image_shape, self.twin.model.spec.image_shape
        if ours != theirs or stored.class_names != self.twin.class_names:
            raise UsageError(
                f"the twin {self.twin.path} takes images {theirs} of {len(self.twin.class_names)} "
                f"classes, {stored.path} {ours} of {len(stored.class_names)}; give a dense run on "
                "the same data"
            )


class RadiusPoint(Frozen):
    """One attack at one radius.

    ``second`` is the accuracy on the attacked images where each row's best expert is taken away,
    ``disagreement`` the share of them that two fixed experts answer differently, the mean over all
    pairs.
    """

    effect: AttackEffect
    second: Share
    disagreement: float


class TwinPoint(Frozen):
    """Accuracy of the dense twin at one radius."""

    epsilon: float
    accuracy: Share


class Twin(Frozen):
    """The dense network beside: ``macs`` of an image, accuracy clean and at each radius."""

    model: str
    macs: int
    accuracy: Share
    points: tuple[TwinPoint, ...]


class RadiiReport(Frozen):
    """What becomes of a model as the radius grows; ``second`` and ``disagreement`` are clean."""

    steps: int
    macs: int
    second: Share
    disagreement: float
    points: tuple[RadiusPoint, ...]
    twin: Twin | None

    def of(self, target: AttackTarget) -> tuple[RadiusPoint, ...]:
        """Return the points of one target, the smallest radius first."""
        return tuple(point for point in self.points if point.effect.attack.target == target)


def over_radii(
    model: Classifier, images: Tensor, labels: Tensor, protocol: Protocol, progress: Progress
) -> RadiiReport:
    """Return what the attacks of ``protocol`` do to a routed ``model`` at each of its radii."""
    steps = len(protocol.radii) * (len(TARGETS) + (protocol.twin is not None))
    with task(progress, "radii", steps):
        points = [
            _point(model, images, labels, ThreatModel(epsilon=radius), protocol, target, progress)
            for target in TARGETS
            for radius in sorted(protocol.radii)
        ]
        return RadiiReport(
            steps=protocol.steps,
            macs=count_macs(model)[0],
            second=second_experts(model, images, labels)[-1].accuracy,
            disagreement=_mean_over_pairs(disagreement(model, images)),
            points=tuple(points),
            twin=_twin(images, labels, protocol, progress),
        )


def _point(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    protocol: Protocol,
    target: AttackTarget,
    progress: Progress,
) -> RadiusPoint:
    attack = protocol.attack(threat, target)
    with attack_task(progress, model, attack, len(labels)):
        found = attack_model(model, images, labels, threat, attack)
    point = RadiusPoint(
        effect=effect_between(model, images, found, labels, threat, attack),
        second=second_experts(model, found, labels)[-1].accuracy,
        disagreement=_mean_over_pairs(disagreement(model, found)),
    )
    progress.advance("radii", robust_accuracy=point.effect.accuracy_attacked.value)
    return point


def _twin(images: Tensor, labels: Tensor, protocol: Protocol, progress: Progress) -> Twin | None:
    if protocol.twin is None:
        return None
    model, points = protocol.twin.model, []
    for radius in sorted(protocol.radii):
        accuracy = withstood(model, images, labels, ThreatModel(epsilon=radius), protocol, progress)
        points.append(TwinPoint(epsilon=radius, accuracy=accuracy))
        progress.advance("radii", robust_accuracy=accuracy.value)
    return Twin(
        model=str(protocol.twin.path),
        macs=count_macs(model)[0],
        accuracy=share_of(predict(model, images) == labels),
        points=tuple(points),
    )


def withstood(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    protocol: Protocol,
    progress: Progress,
) -> Share:
    """Return the accuracy that the attack on the loss alone leaves ``model``."""
    attack = protocol.attack(threat)
    with attack_task(progress, model, attack, len(labels)):
        found = attack_model(model, images, labels, threat, attack)
    return share_of(predict(model, found) == labels)


def _mean_over_pairs(table_EE: tuple[tuple[float, ...], ...]) -> float:
    pairs = [row[other] for one, row in enumerate(table_EE) for other in range(one)]
    return sum(pairs) / len(pairs) if pairs else 0.0

"""Accuracy, routes and redundancy as the radius grows: the protocol of V-MoE's robustness study.

Puigcerver et al., NeurIPS 2022 (arXiv 2210.10253): forty signed steps of a fortieth of the radius,
from the image as it is, on the loss alone and on the loss with V-MoE's auxiliary loss, beside a
dense network at the compute of one expert. There the last step counts; here the worst image that
was met does, so that accuracy is no higher. Any MoE can be looked at so.

A twin has no router to hide behind. Beside it an image counts only where it withstands both, and,
of a hard router, whose exact gradient is none, attacks along each pathway as well.

Shapes: N images, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from advmoe_deploy.analysis.redundancy import disagreement, second_experts
from advmoe_deploy.analysis.routing_change import AttackEffect, effect_between
from advmoe_deploy.analysis.shares import Marked, Share, marked, share_of
from advmoe_deploy.attacks.effort import attack_task
from advmoe_deploy.attacks.white_box import attack_model, predict
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.macs import count_macs
from advmoe_deploy.models.stored import StoredModel
from advmoe_deploy.progress import Progress, task
from advmoe_deploy.specs import AttackSpec, AttackTarget, Frozen, ThreatModel

RADII = tuple(step / 255 for step in (1, 2, 4, 8, 12, 16, 20))
_TARGETS: tuple[AttackTarget, ...] = ("model", "auxiliary")


@dataclass(frozen=True)
class Protocol:
    """Attacks of V-MoE's study: how and where it attacks, and beside what.

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


class Standing(Frozen):
    """Accuracy at one radius; an image counts where it withstands each attack."""

    epsilon: float
    accuracy: Marked


class Twin(Frozen):
    """The dense network beside: ``macs`` of an image, accuracy clean and at each radius."""

    model: str
    macs: int
    accuracy: Share
    points: tuple[Standing, ...]


class RadiiReport(Frozen):
    """Results by growing radius; ``second`` and ``disagreement`` are of clean images.

    ``standing`` is what is left by all ``targets`` together, the smallest radius first.
    """

    steps: int
    macs: int
    second: Share
    disagreement: float
    points: tuple[RadiusPoint, ...]
    targets: tuple[AttackTarget, ...]
    standing: tuple[Standing, ...]
    twin: Twin | None

    def of(self, target: AttackTarget) -> tuple[RadiusPoint, ...]:
        """Return the points of one target, the smallest radius first."""
        return tuple(point for point in self.points if point.effect.attack.target == target)


def targets_of(model: Classifier) -> tuple[AttackTarget, ...]:
    """Return what is attacked: a hard router is met by way of its pathways, too."""
    hard = any(
        rule.weighting == "one" or (rule.weighting == "renormalised" and rule.top_k == 1)
        for rule in model.rules
    )
    return (*_TARGETS, "pathway") if hard else _TARGETS


def over_radii(
    model: Classifier, images: Tensor, labels: Tensor, protocol: Protocol, progress: Progress
) -> RadiiReport:
    """Return what the attacks of ``protocol`` do to a routed ``model`` at each of its radii."""
    targets, radii = targets_of(model), sorted(protocol.radii)
    standing = dict.fromkeys(radii, predict(model, images) == labels)
    with task(progress, "radii", len(radii) * (len(targets) + (protocol.twin is not None))):
        points = []
        for target in _TARGETS:
            for radius in radii:
                threat = ThreatModel(epsilon=radius)
                point, right_N = _point(model, images, labels, threat, protocol, target, progress)
                points.append(point)
                standing[radius] = standing[radius] & right_N
        for target in targets[len(_TARGETS) :]:
            for radius, right_N in standing.items():
                few = images[right_N], labels[right_N]
                threat = ThreatModel(epsilon=radius)
                left_N = withstanding(model, *few, threat, protocol, progress, target)
                standing[radius] = right_N.masked_scatter(right_N, left_N)
                progress.advance("radii", robust_accuracy=share_of(standing[radius]).value)
        return RadiiReport(
            steps=protocol.steps,
            macs=count_macs(model)[0],
            second=second_experts(model, images, labels)[-1].accuracy,
            disagreement=_mean_over_pairs(disagreement(model, images)),
            points=tuple(points),
            targets=targets,
            standing=_standing(standing),
            twin=_twin(images, labels, protocol, progress),
        )


def _standing(found: Mapping[float, Tensor]) -> tuple[Standing, ...]:
    return tuple(Standing(epsilon=e, accuracy=marked(right_N)) for e, right_N in found.items())


def _point(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    protocol: Protocol,
    target: AttackTarget,
    progress: Progress,
) -> tuple[RadiusPoint, Tensor]:
    """Return what one attack does, and whom it leaves right, bool [N]."""
    attack = protocol.attack(threat, target)
    with attack_task(progress, model, attack, len(labels)):
        found = attack_model(model, images, labels, threat, attack)
    point = RadiusPoint(
        effect=effect_between(model, images, found, labels, threat, attack),
        second=second_experts(model, found, labels)[-1].accuracy,
        disagreement=_mean_over_pairs(disagreement(model, found)),
    )
    progress.advance("radii", robust_accuracy=point.effect.accuracy_attacked.value)
    return point, predict(model, found) == labels


def _twin(images: Tensor, labels: Tensor, protocol: Protocol, progress: Progress) -> Twin | None:
    if protocol.twin is None:
        return None
    model, found = protocol.twin.model, {}
    for radius in sorted(protocol.radii):
        threat = ThreatModel(epsilon=radius)
        found[radius] = withstanding(model, images, labels, threat, protocol, progress)
        progress.advance("radii", robust_accuracy=share_of(found[radius]).value)
    return Twin(
        model=str(protocol.twin.path),
        macs=count_macs(model)[0],
        accuracy=share_of(predict(model, images) == labels),
        points=_standing(found),
    )


def withstanding(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    protocol: Protocol,
    progress: Progress,
    target: AttackTarget = "model",
) -> Tensor:
    """Return whom the attack with ``target``, by default on the loss alone, leaves right, [N]."""
    attack = protocol.attack(threat, target)
    with attack_task(progress, model, attack, len(labels)):
        found = attack_model(model, images, labels, threat, attack)
    return predict(model, found) == labels


def _mean_over_pairs(table_EE: tuple[tuple[float, ...], ...]) -> float:
    pairs = [row[other] for one, row in enumerate(table_EE) for other in range(one)]
    return sum(pairs) / len(pairs) if pairs else 0.0

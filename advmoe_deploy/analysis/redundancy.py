"""Redundancy of experts, and the part of a model that gives way under attack.

*Fixed experts* (Robust Experts, arXiv 2509.05086): one expert answers all images and is attacked as
the network it then is. *RA-E* and *RA-R* (arXiv 2502.06832): the experts attacked with the clean
routes fixed, the router attacked alone. *Second experts* (arXiv 2210.10253): the best one is taken
away.

Shapes: N images, E experts, K classes.
"""

from torch import Tensor

from advmoe_deploy.analysis.routing_change import changed_images
from advmoe_deploy.analysis.shares import (
    Difference,
    Marked,
    Share,
    answers,
    difference_of,
    marked,
    share_of,
)
from advmoe_deploy.attacks.effort import attack_task
from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.white_box import attack_model, predict
from advmoe_deploy.models.base import Classifier, require_routes
from advmoe_deploy.models.routing.routing import Routes, Routing, RoutingRule, Surrogate, choose
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.pruning import DROPPED
from advmoe_deploy.specs import AttackSpec, AttackTarget, Frozen, ThreatModel

ALL_LAYERS = "all layers"


class SecondExpert(Frozen):
    """Answers once the best expert of ``layer`` is taken away and the route chosen anew.

    ``lost`` is how much accuracy falls by that, of the same images.
    """

    layer: str
    accuracy: Share
    agreement: Share
    lost: Difference


class FixedExpertRow(Frozen):
    """One expert answering every image: clean accuracy, and under PGD and APGD on that network.

    ``expert`` is ``None`` for the model as it runs, which routes. Each attack is counted for
    itself, both by the same number of steps (APGD on cross-entropy, Croce & Hein, ICML 2020).
    """

    expert: int | None
    clean_accuracy: Share
    robust_accuracy: Share
    apgd_accuracy: Share

    @property
    def withstood(self) -> Share:
        """Accuracy under the stronger of the two attacks."""
        return min(self.robust_accuracy, self.apgd_accuracy, key=lambda share: share.value)


class TargetRow(Frozen):
    """Accuracy under PGD with one target, and the share of images whose route it changed.

    An image is left alone once its answer is wrong, so routes change less than under an attack that
    goes on. For ``experts`` they stay those of the clean images, and ``route_change`` is ``None``.
    """

    target: AttackTarget
    accuracy: Share
    route_change: Share | None


class Withstood(Frozen):
    """Shares of images on which one model withstands PGD with each target.

    ``together`` counts an image only if no target but ``experts``, which is about a model that
    nobody deploys, changed its answer.
    """

    accuracy: Marked
    targets: tuple[TargetRow, ...]
    together: Marked

    def under(self, target: AttackTarget) -> Share:
        """Return the accuracy that PGD with ``target`` leaves."""
        return next(row.accuracy for row in self.targets if row.target == target)


class ExpertReport(Frozen):
    """Redundancy of the experts, and what each part withstands.

    ``disagreement`` [E][E] is the share of images that two fixed experts answer differently.
    ``gated`` is the model as it runs, attacked as each fixed expert is; ``targets`` and
    ``together`` are those of :class:`Withstood`.
    """

    accuracy: Share
    second: tuple[SecondExpert, ...]
    disagreement: tuple[tuple[float, ...], ...]
    fixed: tuple[FixedExpertRow, ...]
    gated: FixedExpertRow
    targets: tuple[TargetRow, ...]
    together: Share


class FixedExpert(Classifier):
    """The dense network that ``model`` becomes when ``expert`` takes every row of every layer."""

    def __init__(self, model: Classifier, expert: int) -> None:
        super().__init__(model.spec)
        self.model = model
        self.expert = expert

    def forward(self, images: Tensor, routes: Routes | None = None) -> Tensor:
        """Return logits [N, K]; there is nothing left to route."""
        logits: Tensor = self.model(images, self.model.forced(self.expert))
        return logits


def expert_report(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    attack: AttackSpec,
    *,
    progress: Progress | None = None,
) -> ExpertReport:
    """Return second and fixed experts, their disagreement, and accuracy under each target.

    Raises:
        UsageError: the model routes nothing, or the attack is no PGD.
    """
    progress = progress or Silent()
    require_routes(model)
    found = withstood(model, images, labels, threat, attack, progress=progress, told="experts")
    gated = FixedExpertRow(
        expert=None,
        clean_accuracy=found.accuracy,
        robust_accuracy=found.under("model"),
        apgd_accuracy=_left_by(_apgd(attack), model, images, labels, threat, progress),
    )
    return ExpertReport(
        accuracy=found.accuracy,
        second=second_experts(model, images, labels),
        disagreement=disagreement(model, images),
        fixed=fixed_experts(model, images, labels, threat, attack, progress=progress),
        gated=gated,
        targets=found.targets,
        together=found.together,
    )


def steps_of_report(model: Classifier) -> int:
    """Return how often :func:`expert_report` advances its listener."""
    return len(model.experts_in_use) + len(TARGETS)


def second_experts(model: Classifier, images: Tensor, labels: Tensor) -> tuple[SecondExpert, ...]:
    """Return what becomes of the answers without the best expert, layer by layer and in all."""
    own_N = predict(model, images)
    layers = [rule.layer for rule in model.rules]
    rows = [(layer, {layer}) for layer in layers]
    if len(layers) > 1:
        rows.append((ALL_LAYERS, set(layers)))
    result = []
    for name, without in rows:
        logits, _ = answers(model, images, Routes(adjust=_WithoutBest(without)))
        other_N = logits.argmax(dim=1)
        row = SecondExpert(
            layer=name,
            accuracy=share_of(other_N == labels),
            agreement=share_of(other_N == own_N),
            lost=difference_of(marked(own_N == labels), marked(other_N == labels)),
        )
        result.append(row)
    return tuple(result)


def disagreement(model: Classifier, images: Tensor) -> tuple[tuple[float, ...], ...]:
    """Return the share of images that two fixed experts answer differently, [E][E]."""
    fixed = [predict(FixedExpert(model, e), images) for e in model.experts_in_use]
    return tuple(tuple(float((one != other).double().mean()) for other in fixed) for one in fixed)


def fixed_experts(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    attack: AttackSpec,
    *,
    progress: Progress,
) -> tuple[FixedExpertRow, ...]:
    """Return the accuracy of every expert when it answers all images, clean and attacked."""
    rows = []
    pgd = attack.model_copy(update={"target": "model"})
    for expert in model.experts_in_use:
        network = FixedExpert(model, expert)
        robust, apgd_robust = (
            _left_by(each, network, images, labels, threat, progress)
            for each in (pgd, _apgd(attack))
        )
        row = FixedExpertRow(
            expert=expert,
            clean_accuracy=share_of(predict(network, images) == labels),
            robust_accuracy=robust,
            apgd_accuracy=apgd_robust,
        )
        rows.append(row)
        progress.advance("experts", robust_accuracy=row.withstood.value)
    return tuple(rows)


def _apgd(pgd: AttackSpec) -> AttackSpec:
    """Return APGD of as many steps."""
    return AttackSpec(name="apgd", steps=pgd.steps, seed=pgd.seed)


def _left_by(
    attack: AttackSpec,
    network: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    progress: Progress,
) -> Share:
    """Return the accuracy that ``attack`` leaves ``network``."""
    with attack_task(progress, network, attack, len(labels)):
        found = find_adversarial(network, images, labels, threat, attack, first_only=True)
    return share_of(predict(network, found) == labels)


TARGETS: tuple[AttackTarget, ...] = ("model", "straight-through", "pathway", "router", "experts")


def withstood(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    attack: AttackSpec,
    *,
    progress: Progress,
    told: str,
) -> Withstood:
    """Return what ``model``, which routes, withstands; ``told`` is the task that advances."""
    rows = []
    clean_N, (_, clean) = predict(model, images) == labels, answers(model, images)
    standing_N = clean_N
    for target in TARGETS:
        aimed = attack.model_copy(update={"target": target})
        with attack_task(progress, model, aimed, len(labels)):
            found = attack_model(model, images, labels, threat, aimed, first_only=True)
        fixed = target == "experts"
        right_N = predict(model, found, routes_of=images if fixed else None) == labels
        changed = None
        if not fixed:
            standing_N = standing_N & right_N
            changed = share_of(changed_images(clean, answers(model, found)[1], len(labels)))
        rows.append(TargetRow(target=target, accuracy=share_of(right_N), route_change=changed))
        progress.advance(told, robust_accuracy=rows[-1].accuracy.value)
    return Withstood(accuracy=marked(clean_N), targets=tuple(rows), together=marked(standing_N))


class _WithoutBest:
    """Chooses, in some layers, as if the best expert of each row were not there."""

    def __init__(self, layers: set[str]) -> None:
        self.layers = layers

    def __call__(
        self, rule: RoutingRule, scores_NE: Tensor, surrogate: Surrogate | None
    ) -> Routing:
        if rule.layer in self.layers:
            best_N1 = choose(scores_NE, rule).expert_ids_NK[:, :1]
            # Where no other is left, the best one stays, at top-k above 1 with a weight of 0.
            scores_NE = scores_NE.scatter(1, best_N1, DROPPED / 2)
        return choose(scores_NE, rule, surrogate)

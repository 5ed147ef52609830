"""Accuracy gate of a lower precision: measurements next to the torch model, and their limits.

Logits differ by far more than float32's rounding, so they are no measure. Routes count, and the
loss of accuracy, clean and under attack. That is a
:class:`~advmoe_deploy.parity.drop.Drop`: of a few hundred images, one more or less is chance.

Shapes: N images, C channels, H height, W width.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.parity.answers import Answers, Flags, Images, Labels
from advmoe_deploy.parity.batches import batch_complaint, steady_images
from advmoe_deploy.parity.compare import CLOSE_CALL, compare_answers, is_right, predictions_of
from advmoe_deploy.parity.drop import Drop
from advmoe_deploy.parity.intervals import chance_of_more
from advmoe_deploy.parity.tolerance import tolerance_for
from advmoe_deploy.reports import OwnAttack, Pair, ParityReport, PrecisionReport, RouterPrecision
from advmoe_deploy.reports.drops import ACCURACIES, Accuracy
from advmoe_deploy.runtime.runner import Runner, is_exact
from advmoe_deploy.specs import AttackSpec

LEAST_ROUTE_AGREEMENT = 0.999
MAX_DROP = 0.5  # points

# What happens by chance less often than this is taken for more than chance.
_UNLIKELY = 0.025
# A drop beyond the limit that chance explains less often than this is not taken on trust, though it
# is not proven: a higher precision is there to go back to.
SUSPICIOUS = 0.2

ATTACK = AttackSpec(name="pgd", steps=10)
# For models that route: a hard route gives the attack above no gradient.
PATHWAY_ATTACK = AttackSpec(
    name="pgd", target="pathway", steps=10, loss="margin", momentum=0.75, decay=True
)

# From images to the logits of the model under attack.
LogitsOf = Callable[[Images], NDArray[np.float32]]


@dataclass(frozen=True)
class AnsweredImages:
    """Images and what the torch model answers to them."""

    images: Images
    answers: Answers


@dataclass(frozen=True)
class GateLimits:
    """The share of a layer's clear routes that has to agree, and of predictions that may differ.

    The latter counts where there are no labels. Of a ``sample``, of few images, what chance does
    not explain is too much.
    """

    least_route_agreement: float = LEAST_ROUTE_AGREEMENT
    predictions: float = MAX_DROP / 100
    sample: bool = False

    def exceeded(self, share: float, of: int, limit: float) -> bool:
        """Return whether a ``share`` out of ``of`` is more than ``limit`` allows."""
        if self.sample:
            return chance_of_more(round(share * of), of, limit) < _UNLIKELY
        return round(share - limit, 9) > 0


@dataclass(frozen=True)
class AccuracyGate:
    """Images and limits that a choice of precisions is measured on.

    The parity's images are from ``data``; ``rounding`` and ``margin`` are the torch model's own.
    The labelled images are hold-out images of ``labels``; ``attacked`` were found on the torch
    model by ``attacks``, those along pathways on the first ``pathway_images`` alone, and ``attack``
    finds them on any model by its answers. With ``tolerance`` logits in fp32 may differ by as much
    from batch to batch, if the rounding does not allow more.
    """

    parity: AnsweredImages
    data: str
    rounding: float = 0.0
    margin: float = CLOSE_CALL
    labelled: str | None = None
    labels_N: Labels | None = None
    clean: AnsweredImages | None = None
    attacked: AnsweredImages | None = None
    attack: Callable[[LogitsOf], Images] | None = None
    attacks: tuple[AttackSpec, ...] = ()
    pathway_images: int = 0
    tolerance: float = 0.0
    limits: GateLimits = GateLimits()


@dataclass(frozen=True)
class Findings:
    """Results of one choice of precisions; accuracies and drops where there are labels.

    ``batches`` says how answers depend on the batch, if they do.
    """

    parity: ParityReport
    prediction_agreement: float
    mean_logit_diff: float
    clean_accuracy: Pair | None
    robust_accuracy: Pair | None
    attacked_route_agreement: float | None
    own_attack: OwnAttack | None = None
    drops: Mapping[Accuracy, Drop] = field(default_factory=dict)
    batches: str = ""
    limits: GateLimits = GateLimits()

    @property
    def routes_agree(self) -> bool:
        """True if enough clear routes are the same."""
        allowed = 1 - self.limits.least_route_agreement
        return not any(
            rows == 0 or self.limits.exceeded(flips / rows, rows, allowed)
            for flips, rows in self._clear_routes
        )

    @property
    def least_agreement(self) -> float:
        """The share of clear routes that are the same in the layer where fewest are."""
        agree = [1 - flips / rows if rows else 0.0 for flips, rows in self._clear_routes]
        return min(agree, default=1.0)

    @property
    def _clear_routes(self) -> list[tuple[int, int]]:
        """By layer how many clear routes differ, and how many there are."""
        layers = self.parity.layers
        return [(layer.flips, layer.rows - layer.close_calls) for layer in layers]

    @property
    def regression(self) -> tuple[float, float, float]:
        """Regression against the torch model: routes first, then classes, then logits."""
        return (
            1 - self.parity.route_agreement,
            1 - self.prediction_agreement,
            self.mean_logit_diff,
        )

    @property
    def complaint(self) -> str:
        """Complaint of what is not good enough; empty if all is."""
        if self.parity.non_finite:
            return f"{self.parity.non_finite} of {self.parity.images} images give no finite logits"
        if not self.routes_agree:
            limit = _percent(self.limits.least_route_agreement)
            agree = _percent_below(self.least_agreement)
            return f"{agree} of the clear routes of a layer agree, less than {limit}"
        if not self.parity.mostly_compared:
            return f"{self.parity.compared} of {self.parity.images} images keep all their routes"
        if self.batches:
            return self.batches
        for name, drop in self.drops.items():
            if too_much(drop, MAX_DROP):
                return f"{ACCURACIES[name]} falls by {drop.report(MAX_DROP).figures()}"
        # Without labels: as many predictions that differ are at most as many points lost.
        changed, limits = 1 - self.prediction_agreement, self.limits
        if self.clean_accuracy is None and limits.exceeded(
            changed, self.parity.images, limits.predictions
        ):
            return f"{_percent(changed)} of the predictions differ"
        return ""


def too_much(drop: Drop, max_drop: float) -> bool:
    """Return whether a choice of precisions is refused for ``drop``.

    It is where the drop has failed: of 200 images, where seven are lost and none is won. So few
    images prove little, and a search that lowers whatever it can must not take that for consent. So
    a drop measured beyond ``max_drop`` is refused as well where chance alone gives one like it in
    less than a fifth of all cases (McNemar's test, one-sided): three images lost and none won.
    """
    if drop.verdict(max_drop) == "failed":
        return True
    return drop.points > max_drop and drop.p_lost < SUSPICIOUS


def run_gate(gate: AccuracyGate, runner: Runner) -> Findings:
    """Return what ``runner`` answers in ``gate``, next to the torch model."""
    answer = predictions_of(runner, gate.parity.images)
    expected = gate.parity.answers
    same_N = answer.logits.argmax(axis=1) == expected.logits.argmax(axis=1)
    right: dict[Accuracy, tuple[Flags, Flags]] = {}
    agreement = None
    if gate.clean is not None:
        right["clean"], _ = standing, _ = _right(gate, gate.clean, runner)
        if gate.attacked is not None:
            (reference_N, engine_N), agreement = _right(gate, gate.attacked, runner)
            right["robust"] = standing[0] & reference_N, standing[1] & engine_N
    accuracies = {name: _pair(*flags) for name, flags in right.items()}
    return Findings(
        parity=compare_answers(
            expected, answer, rounding=gate.rounding, margin=gate.margin, data=gate.data
        ),
        prediction_agreement=float(same_N.mean()),
        mean_logit_diff=float(np.abs(answer.logits - expected.logits).mean()),
        clean_accuracy=accuracies.get("clean"),
        robust_accuracy=accuracies.get("robust"),
        attacked_route_agreement=agreement,
        drops={name: Drop.between(*flags) for name, flags in right.items()},
        batches=batches_in(gate, runner),
        limits=gate.limits,
    )


def batches_in(gate: AccuracyGate, runner: Runner) -> str:
    """Return how answers of ``runner`` depend on the batch; nothing if they do not."""
    images, answers = gate.parity.images, gate.parity.answers
    if not is_exact(runner):
        return batch_complaint(runner, steady_images(images, answers), None)
    steady = steady_images(images, answers, margin=gate.margin)
    return batch_complaint(runner, steady, max(gate.tolerance, tolerance_for(gate.rounding)))


def attack_itself(gate: AccuracyGate, runner: Runner, findings: Findings) -> Findings:
    """Return ``findings`` with what withstands when ``runner`` is attacked by its own answers.

    Examples found on the torch model flatter an engine whose decision boundaries have moved. Here
    each side meets what was found on it. Nothing is added where nothing is attacked.
    """
    if gate.attack is None or gate.clean is None or gate.attacked is None:
        return findings
    found = gate.attack(lambda images: runner.infer(images).logits)
    reference_N = _right_in_torch(gate, gate.clean) & _right_in_torch(gate, gate.attacked)
    engine_N = _right_here(gate, gate.clean.images, runner) & _right_here(gate, found, runner)
    drop = Drop.between(reference_N, engine_N)
    least, most = drop.interval
    own = OwnAttack(robust_accuracy=_pair(reference_N, engine_N), least_drop=least, most_drop=most)
    return replace(findings, own_attack=own, drops={**findings.drops, "own_attack": drop})


def precision_report(
    gate: AccuracyGate,
    raised: Mapping[str, str],
    findings: Findings,
    router: RouterPrecision | None = None,
) -> PrecisionReport:
    """Return the record of what ``gate`` found, and of what had to be raised for it."""
    return PrecisionReport(
        raised=dict(raised),
        prediction_agreement=findings.prediction_agreement,
        holdout_images=0 if gate.labels_N is None else len(gate.labels_N),
        data=gate.labelled,
        attack=ATTACK if gate.attacked is not None else None,
        clean_accuracy=findings.clean_accuracy,
        robust_accuracy=findings.robust_accuracy,
        own_attack=findings.own_attack,
        attacked_route_agreement=findings.attacked_route_agreement,
        router=router,
        attacks=gate.attacks,
        pathway_images=gate.pathway_images,
        drops={name: drop.report(MAX_DROP) for name, drop in findings.drops.items()},
        least_route_agreement=gate.limits.least_route_agreement,
        max_drop=MAX_DROP,
    )


def _right(
    gate: AccuracyGate, examples: AnsweredImages, runner: Runner
) -> tuple[tuple[Flags, Flags], float]:
    """Return which images [N] the torch model and the runner get right, and how routes agree."""
    answer = predictions_of(runner, examples.images)
    engine_N = is_right(answer.logits, _labels(gate))
    agreement = compare_answers(examples.answers, answer, margin=gate.margin).route_agreement
    return (_right_in_torch(gate, examples), engine_N), agreement


def _right_in_torch(gate: AccuracyGate, examples: AnsweredImages) -> Flags:
    return is_right(examples.answers.logits, _labels(gate))


def _right_here(gate: AccuracyGate, images: Images, runner: Runner) -> Flags:
    return is_right(predictions_of(runner, images).logits, _labels(gate))


def _labels(gate: AccuracyGate) -> Labels:
    assert gate.labels_N is not None, "there are examples"
    return gate.labels_N


def _pair(reference_N: Flags, engine_N: Flags) -> Pair:
    return Pair(reference=float(reference_N.mean()), engine=float(engine_N.mean()))


def _percent_below(share: float) -> str:
    """Return a share that is too small, not rounded up to the limit that it is below."""
    return _percent(math.floor(round(1e4 * share, 6)) / 1e4)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"

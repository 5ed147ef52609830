"""Verdict of ``verify``: what the engine lost, and whether the images decide that.

Shapes: N images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.parity.answers import Flags
from advmoe_deploy.parity.drop import Drop
from advmoe_deploy.parity.intervals import chance_of_more, wilson_interval
from advmoe_deploy.reports.drops import DropReport, Verdict, worst_of
from advmoe_deploy.verify.findings import Finding
from advmoe_deploy.verify.report import ReferenceReport
from advmoe_deploy.verify.trial import Trial

# What a reference may be better than chance by and still count as no better.
_NEAR = 0.05


@dataclass(frozen=True)
class Judgement:
    """The verdict, what it rests on, and what has to be said beside it."""

    verdict: Verdict
    clean: DropReport
    robust: DropReport
    reference: ReferenceReport
    warnings: tuple[str, ...]


def judge(
    trial: Trial,
    findings: Sequence[Finding],
    *,
    max_drop: float,
    same_function: bool,
    chance: float = 0.0,
    allow_fragile: bool = False,
) -> Judgement:
    """Return the judgement of ``trial``, whose engine may lose ``max_drop`` points.

    A finding fails it. With ``same_function`` the engine was shown to answer as the reference does,
    to the rounding of float32: there is no population to conclude on, so the images that only the
    reference gets right are simply counted. Any other engine is judged by the paired intervals.
    A reference that withstands no more than ``chance`` has nothing to lose, and that nothing was
    lost says nothing: it fails too unless ``allow_fragile``.
    """
    clean, robust = (Drop.between(s.reference_N, s.engine_N) for s in (trial.clean, trial.standing))
    judged = [drop.report(max_drop, counted=same_function) for drop in (clean, robust)]
    verdicts = {drop.verdict for drop in judged}
    reference = judge_reference(trial.standing.reference_N, chance)
    if not allow_fragile:
        verdicts.add(reference.verdict)
    if findings:
        verdicts.add("failed")
    warnings = [str(reference)] if reference.verdict != "passed" else []
    if robust.gained_beyond_chance:
        warnings.append(
            f"the engine looks more robust than its reference ({robust.sentence()}): examples that "
            "suit the reference do not suit it, so its own robustness is unknown"
        )
    return Judgement(worst_of(verdicts), judged[0], judged[1], reference, tuple(warnings))


def judge_reference(standing_N: Flags, chance: float) -> ReferenceReport:
    """Return whether a reference of whose images ``standing_N`` stand is better than ``chance``.

    That it is not takes evidence as well: an interval that ends near chance.
    """
    images, stand = len(standing_N), int(standing_N.sum())
    share, interval = stand / images, wilson_interval(stand, images)
    verdict: Verdict = "passed" if interval[0] > chance else "undecided"
    if share <= chance and interval[1] < chance + _NEAR:
        verdict = "failed"
    return ReferenceReport(
        images=images,
        robust_accuracy=share,
        interval=interval,
        chance=chance,
        verdict=verdict,
    )


def chance_of(labels_N: NDArray[np.int64], classes: int) -> float:
    """Return the share of images that an answer which looks at none of them gets right.

    No attack changes such an answer. It is one by the number of ``classes`` or, where the commonest
    is there more often than sampling explains (95 %, corrected for that any class may be it), the
    share of that one.
    """
    most, images = int(np.bincount(labels_N).max()), len(labels_N)
    by_sampling = classes * chance_of_more(most, images, 1 / classes)
    return most / images if by_sampling < 0.05 else 1 / classes

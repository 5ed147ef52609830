"""Verdict of ``verify``: what the engine lost, and whether the images decide that."""

from collections.abc import Sequence
from dataclasses import dataclass

from advmoe_deploy.parity.drop import Drop
from advmoe_deploy.reports.drops import DropReport, Verdict
from advmoe_deploy.verify.findings import Finding
from advmoe_deploy.verify.trial import Trial


@dataclass(frozen=True)
class Judgement:
    """The verdict, the drops it rests on, and what has to be said beside it."""

    verdict: Verdict
    clean: DropReport
    robust: DropReport
    warnings: tuple[str, ...]


def judge(
    trial: Trial, findings: Sequence[Finding], *, max_drop: float, same_function: bool
) -> Judgement:
    """Return the judgement of ``trial``, whose engine may lose ``max_drop`` points.

    A finding fails it. With ``same_function`` the engine was shown to answer as the reference does,
    to the rounding of float32: there is no population to conclude on, so the images that only the
    reference gets right are simply counted. Any other engine is judged by the paired intervals.
    """
    clean, robust = (Drop.between(s.reference_N, s.engine_N) for s in (trial.clean, trial.standing))
    verdicts = {_counted(drop, max_drop) for drop in (clean, robust)}
    if not same_function:
        verdicts = {drop.verdict(max_drop) for drop in (clean, robust)}
    if findings:
        verdicts = {"failed"}
    verdict: Verdict = "passed"
    if "failed" in verdicts:
        verdict = "failed"
    elif "undecided" in verdicts:
        verdict = "undecided"
    warnings = []
    if robust.gained_beyond_chance:
        warnings.append(
            f"the engine looks more robust than its reference ({robust.sentence()}): examples that "
            "suit the reference do not suit it, so its own robustness is unknown"
        )
    return Judgement(verdict, clean.report(max_drop), robust.report(max_drop), tuple(warnings))


def _counted(drop: Drop, max_drop: float) -> Verdict:
    return "passed" if 100 * drop.only_reference <= max_drop * drop.images else "failed"

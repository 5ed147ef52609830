"""Verdict of a robustness report: did it survive the export, and what withstands at all."""

from advmoe_deploy.cli.verdicts.said import Said, percent
from advmoe_deploy.parity.intervals import paired_difference_interval
from advmoe_deploy.reports import Pair
from advmoe_deploy.reports.text import count_of
from advmoe_deploy.settings import epsilon_text
from advmoe_deploy.verify.examples.convergence import lines_of
from advmoe_deploy.verify.examples.entry import Robustness
from advmoe_deploy.verify.report import AttackOutcome, ReferenceReport, RobustReport


def export_verdict(report: RobustReport) -> Said:
    """Return whether robustness survived the export."""
    robust = _arrow(report.robust_accuracy)
    if report.findings:
        return Said(f"{report.engine} does not answer as the model does: do not ship it", "worse")
    reference = report.reference
    if reference is not None and reference.verdict == "failed":
        return Said(_sentence(reference), "worse")
    if report.verdict == "failed":
        return Said(f"{_loss(report)}, more than the {report.max_drop:g} points allowed", "worse")
    if report.fragility:
        return Said(f"Undecided: {reference}", "unsure")
    if report.verdict == "undecided":
        few = f"{count_of(report.images, 'image')} cannot tell"
        what = f"whether robust accuracy survived the export ({robust})"
        return Said(f"Undecided: {few} {what}", "unsure")
    if not report.robust_accuracy.reference:
        return Said(f"Nothing withstands these attacks, before or after: {robust}", "worse")
    return Said(f"Robust accuracy survived the export: {robust}")


def withstands(report: RobustReport) -> Said:
    """Return how many images no attack broke, with all that goes with the number."""
    low, high = report.robust_interval
    count = len(report.attacks)
    return Said(
        f"{percent(report.robust_accuracy.engine)} of {report.images} test images withstand "
        f"{f'all {count} attacks' if count > 1 else 'the attack'}, at l-inf epsilon "
        f"{epsilon_text(report.threat.epsilon)} (95 %: {percent(low)} to {percent(high)}); "
        f"{percent(report.clean_accuracy.engine)} are right unattacked"
    )


def robust_verdict(measured: Robustness) -> list[Said]:
    """Return the verdict of the first engine, what withstands, and what else there is to know."""
    first, *others = measured.engines
    said = [export_verdict(first), withstands(first)]
    for other in others:
        verdict = export_verdict(other)
        said.append(Said(f"{other.engine} {other.precision}: {verdict.text}", verdict.tone))
    return [*said, _converged(measured)]


def model_only(report: RobustReport) -> AttackOutcome | None:
    """Return PGD on the model alone, the figure that papers quote, where it was the first attack.

    Only the first attack sees every image, so only of the first the figure is its own.
    """
    first = report.attacks[0] if report.attacks else None
    return first if first and (first.attack.name, first.attack.target) == ("pgd", "model") else None


def _loss(report: RobustReport) -> str:
    """Return which accuracy was lost, by the rule that judged it."""
    what, pair, drop = "Robust accuracy", report.robust_accuracy, report.robust_drop
    if report.lost == "clean":
        what, pair, drop = "Accuracy", report.clean_accuracy, report.clean_drop
    if report.consistency.same_function:
        return f"{what} was lost: {drop.counted()} ({_arrow(pair)})"
    return f"{what} was lost: {_arrow(pair)}"


def _sentence(reference: ReferenceReport) -> str:
    text = str(reference)
    return text[:1].upper() + text[1:]


def _arrow(pair: Pair) -> str:
    return f"{percent(pair.reference)} → {percent(pair.engine)}"


def _converged(measured: Robustness) -> Said:
    lines = lines_of(measured.convergence)
    if len(lines[0]) < 2:
        return Said("Whether more steps of PGD would break more was not looked at", "unsure")
    before, last = max(
        ((line[-2], line[-1]) for line in lines),
        key=lambda pair: pair[0].robust_accuracy - pair[1].robust_accuracy,
    )
    more = before.robust_accuracy - last.robust_accuracy
    steps = f"{last.steps} steps of PGD instead of {before.steps}"
    # The same images: that a few fell of which none stood again is no chance.
    if paired_difference_interval(last.fell, last.stood, last.images)[0] > 0:
        said = f"{steps} still break {100 * more:.1f} points more: the true figure is lower"
        return Said(said, "unsure")
    if more <= 0:
        return Said(f"{steps} break no more: the attack has converged")
    return Said(f"{steps} break {100 * more:.1f} points more at most, within chance")

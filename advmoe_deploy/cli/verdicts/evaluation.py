"""Verdict of an evaluation on clean images."""

from advmoe_deploy.cli.verdicts.said import Said, percent
from advmoe_deploy.evaluation.report import EvalReport
from advmoe_deploy.reports.text import count_of


def evaluation_verdict(report: EvalReport) -> list[Said]:
    """Return accuracy, the weakest class, and how far confidence can be believed."""
    low, high = report.accuracy_interval
    said = [
        Said(f"{percent(report.accuracy)} of {report.images} clean test images are right"),
        Said(f"{report.correct} images, 95 % interval {percent(low)} to {percent(high)}"),
    ]
    weakest = min(
        (each for each in report.classes if each.recall is not None),
        key=lambda each: each.recall or 0.0,
        default=None,
    )
    if weakest is not None:
        right = f"{percent(weakest.recall or 0.0)} of {count_of(weakest.images, 'image')} right"
        said.append(Said(f"Weakest class: {weakest.name}, {right}"))
    if report.reliability is not None:
        ece, mean = report.reliability.ece, percent(report.reliability.mean_confidence)
        said.append(Said(f"Confidence, {mean} in the mean, is {100 * ece:.1f} points off"))
    return [*said, Said("Nothing was attacked: this says nothing about robustness")]

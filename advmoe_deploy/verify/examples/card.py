"""The section of a model card on what ``advmoe report`` measured; a later one takes its place."""

import re
from collections.abc import Iterator
from itertools import groupby

from advmoe_deploy.parity.intervals import wilson_interval
from advmoe_deploy.settings import epsilon_text
from advmoe_deploy.specs import AttackSpec
from advmoe_deploy.verify.examples.entry import Robustness
from advmoe_deploy.verify.report import AttackOutcome, RobustReport

_BEGIN = "<!-- advmoe report: begin; the next 'advmoe report' replaces this section -->"
_END = "<!-- advmoe report: end -->"
_SECTION = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)

_FAMILIES = {
    "apgd": "APGD on cross-entropy",
    "apgd-t": "APGD-T",
    "fab-t": "FAB-T",
    "square": "Square",
    "rays": "RayS",
    "autoattack": "AutoAttack",
}


def with_measured(card: str, measured: Robustness) -> str:
    """Return ``card`` with the section of ``measured``, where the last one was or at its end.

    It says nothing of when and how fast: the same figures give the same card.
    """
    section = f"{_BEGIN}\n{_section(measured)}\n{_END}"
    if _SECTION.search(card):
        return _SECTION.sub(lambda _: section, card, count=1)
    return f"{card.rstrip()}\n\n{section}\n"


def _section(measured: Robustness) -> str:
    first, versions = measured.engines[0], measured.versions.items()
    return "\n\n".join(
        [
            "## Measured by `advmoe report`",
            f"On {first.images} test images of `{' '.join(first.data.split())}`, "
            f"{first.threat.norm}, epsilon {epsilon_text(first.threat.epsilon)} in [0, 1] "
            f"pixels, by the attacks of suite `{measured.suite}`. "
            "Each row counts what withstood it and the rows above it.",
            *(_engine(report) for report in measured.engines),
            f"With {', '.join(f'{name} {version}' for name, version in versions)}.",
        ]
    )


def _engine(report: RobustReport) -> str:
    tf32 = " with TF32" if report.tf32 else ""
    lines = [
        f"`--engine {report.engine}`, {report.precision}{tf32}: {report.verdict}, against a limit "
        f"of {report.max_drop:g} points.\n",
        "| | right | 95 % interval | torch model |",
        "|---|---:|---:|---:|",
        *(_row(*row, images=report.images) for row in _rows(report)),
        "",
        f"Drop in robust accuracy: {report.robust_drop.figures()}.{_judged(report)}",
        *(f"- warning: {line}" for line in report.warnings),
        *(f"- {finding.kind}: {finding.message}" for finding in report.findings),
    ]
    return "\n".join(lines)


def _judged(report: RobustReport) -> str:
    return f" {report.decided_by}." if report.decided_by else ""


def _rows(report: RobustReport) -> Iterator[tuple[str, float, float]]:
    """Yield what happened, and the accuracies of the engine and of the torch model after it."""
    clean, robust = report.clean_accuracy, report.robust_accuracy
    yield "clean", clean.engine, clean.reference
    for name, group in groupby(report.attacks, key=_family):
        outcomes = list(group)
        after = outcomes[-1].robust_accuracy
        count = f" ({len(outcomes)} attacks)" if len(outcomes) > 1 else ""
        yield f"{name}{count}", after.engine, after.reference
    yield "**robust: all of them**", robust.engine, robust.reference


def _row(what: str, engine: float, reference: float, *, images: int) -> str:
    low, high = wilson_interval(round(engine * images), images)
    return (
        f"| {what} | {100 * engine:.2f} % | {100 * low:.2f} to {100 * high:.2f} % "
        f"| {100 * reference:.2f} % |"
    )


def _family(outcome: AttackOutcome) -> str:
    asked = ", the engine asked" if outcome.found_on == "engine" else ""
    return f"{_name(outcome.attack)}{asked}"


def _name(attack: AttackSpec) -> str:
    if attack.name != "pgd":
        return _FAMILIES[attack.name]
    where = "PGD on the model" if attack.target == "model" else "PGD through the routes"
    return f"{where}, classes in turn" if attack.classes else where

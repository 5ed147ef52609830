"""Tables of ``eval``."""

from rich.console import Group, RenderableType

from advmoe_deploy.cli.tables.escape import escape
from advmoe_deploy.cli.tables.fitted import FittedTable
from advmoe_deploy.cli.verdicts.said import percent
from advmoe_deploy.evaluation.report import EvalReport, ExpertUse, Reliability

_CLASSES, _PAIRS, _EXPERTS = 10, 5, 8


def evaluation_report(report: EvalReport) -> RenderableType:
    """Return the classes with the lowest recall, and a line for each other figure."""
    low, high = report.accuracy_interval
    computed = f"{report.engine} {report.precision}{' with TF32' if report.tf32 else ''}"
    lines = [
        f"accuracy {percent(report.accuracy)} (95 %: {percent(low)} to {percent(high)}), "
        f"{report.correct} of {report.images} test images of {report.data}",
        f"{report.kind} {report.model} on {computed}, {report.seconds:.1f} s; nothing was attacked",
    ]
    more = [f"warning: {report.unanswered} answers are not finite"] * bool(report.unanswered)
    more += [
        f"{pair.label} taken for {pair.taken_for}: {pair.images} image{'s' * (pair.images > 1)}"
        for pair in report.most_confused(_PAIRS)
    ]
    more += [_reliability(report.reliability)] if report.reliability else []
    more += [_use(use) for use in report.experts]
    more += [f"warning: {line}" for line in report.warnings]
    return Group(*map(escape, lines), _classes(report), *map(escape, more))


def _classes(report: EvalReport) -> RenderableType:
    met = [each for each in report.classes if each.images or each.predicted]
    met.sort(key=lambda each: 2.0 if each.recall is None else each.recall)
    shown, left = met[:_CLASSES], len(met) - _CLASSES
    rest = f"the {_CLASSES} of lowest recall; --json has {left} more" if left > 0 else "by recall"
    table = FittedTable(f"classes, {rest}", ("class", "images", "recall", "95 %", "precision"))
    for each in shown:
        low, high = each.recall_interval
        table.add_row(
            escape(each.name),
            str(each.images),
            "-" if each.recall is None else percent(each.recall),
            f"{percent(low)} to {percent(high)}",
            "-" if each.precision is None else percent(each.precision),
        )
    return table


def _reliability(reliability: Reliability) -> str:
    return (
        f"mean confidence {percent(reliability.mean_confidence)}; expected calibration error "
        f"{percent(reliability.ece)} ({len(reliability.bins)} bins); negative log-likelihood "
        f"{reliability.negative_log_likelihood:.3f}"
    )


def _use(use: ExpertUse) -> str:
    shares = [f"{expert}: {percent(share)}" for expert, share in enumerate(use.shares[:_EXPERTS])]
    more = ", ..." if len(use.shares) > _EXPERTS else ""
    return (
        f"of these images the experts of {use.layer} got {', '.join(shares)}{more}; "
        f"{use.effective_routes:.2f} effective routes of {len(use.shares)}"
    )

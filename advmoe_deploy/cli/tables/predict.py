"""Lines of ``predict``."""

from collections import Counter

from rich.console import Group, RenderableType

from advmoe_deploy.cli.tables.bundle import facts
from advmoe_deploy.cli.tables.escape import escape
from advmoe_deploy.cli.verdicts.said import percent
from advmoe_deploy.serving.job import BatchReport
from advmoe_deploy.serving.one import OneAnswer


def batch_report(report: BatchReport) -> RenderableType:
    """Return how many inputs were classified and where the answers are."""
    return escape("\n".join(batch_lines(report)))


def batch_lines(report: BatchReport) -> list[str]:
    """Return what there is to say of a batch job, the first inputs without an answer by name."""
    resumed = f", {report.resumed} of them by an earlier run" if report.resumed else ""
    lines = [
        f"{report.images - report.errors} of {report.images} images classified{resumed}, "
        f"{report.images_per_s:.0f} images/s on {report.engine} {report.precision}: {report.output}"
    ]
    if found := report.accuracy:
        low, high = found.interval
        lines.append(
            f"accuracy {percent(found.share)} (95 %: {percent(low)} to {percent(high)}), "
            f"{found.correct} of {found.images} images, by the names of their folders"
        )
    if found and found.trained_on:
        lines.append(
            "note: the model was trained on images of this folder, which flatters it; 'advmoe eval "
            "BUNDLE' has the accuracy on its test images alone"
        )
    if report.errors:
        # repr escapes what a terminal would obey.
        named = ", ".join(f"{each.path!r} ({each.error})" for each in report.unread)
        more = ", ..." if report.errors > len(report.unread) else ""
        lines.append(f"note: {report.errors} unreadable, each a row with its error: {named}{more}")
    return lines + [f"note: {skipped}" for skipped in report.skipped]


def one_answer(answer: OneAnswer) -> RenderableType:
    """Return class, probability and route of one picture."""
    rows = [("class", answer.label), ("probability", percent(answer.probability))]
    rows += [
        (f"{place}.", f"{each.label}, {percent(each.probability)}")
        for place, each in enumerate(answer.top_k, 1)
    ]
    rows += [(f"expert of {layer}", _experts(ids)) for layer, ids in answer.expert_ids.items()]
    rows.append(("computed by", f"{answer.engine} {answer.precision}"))
    return Group(facts(answer.path, rows))


def _experts(ids: list[int] | list[list[int]]) -> str:
    """Return the ids of an image, or how many tokens go to each expert."""
    tokens = Counter(e for each in ids if isinstance(each, list) for e in each)
    if not tokens:
        return ", ".join(map(str, ids))
    return ", ".join(f"{expert} ({count} tokens)" for expert, count in sorted(tokens.items()))

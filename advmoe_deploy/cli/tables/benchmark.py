"""Tables of ``benchmark``."""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType

from advmoe_deploy.cli.tables.escape import escape
from advmoe_deploy.cli.tables.fitted import FittedTable
from advmoe_deploy.comparison.report import BenchmarkReport, Contender, MeasuredShare, Timing
from advmoe_deploy.reports.text import count_of

_MARK = "*"
_COLUMNS = ("MB", "clean %", "robust %")


def benchmark_report(report: BenchmarkReport) -> RenderableType:
    """Return a row per engine and precision, the best for the aim marked, and what was measured."""
    batches = [timing.batch for timing in report.contenders[0].timings]
    columns = ("engine", *_COLUMNS, *(f"ms at {n}" for n in batches))
    least = ("vs dense", "MB") if report.aim == "size" else ("MB", "vs dense")
    table = FittedTable(report.bundle, (*columns, "vs dense"), least)
    for each in report.contenders:
        mark = _MARK if each.best else " "
        table.add_row(escape(f"{mark} {each.name}"), *_cells(each), _ratio(_deciding(each, report)))
    return Group(table, *map(escape, _lines(report)))


def unfinished(contenders: Sequence[Contender]) -> RenderableType:
    """Return what is known of each engine, where the comparison did not come to its end."""
    batches = [timing.batch for timing in contenders[0].timings]
    table = FittedTable("unfinished", ("engine", *_COLUMNS, *(f"ms at {n}" for n in batches)))
    for each in contenders:
        table.add_row(escape(each.name), *_cells(each))
    return table


def _cells(each: Contender) -> list[str]:
    shares = (_percent(share) for share in (each.clean, each.robust))
    return [f"{each.bytes / 1e6:.2f}", *shares, *(f"{t.p50_ms:.3g}" for t in each.timings)]


def _lines(report: BenchmarkReport) -> list[str]:
    contenders, first = report.contenders, report.latency.rows[0]
    clean = _sources(each.clean for each in contenders)
    robust = _sources(each.robust for each in contenders)
    lines = [f"{_MARK} best for {report.aim}: {report.best.name}{_warning(report)}"]
    lines += [f"clean: {source}" for source in clean]
    lines += [f"robust: {source}" for source in robust]
    if not robust:
        lines.append("robust accuracy is not measured unless asked for: --attacks quick does")
    if len([each for each in contenders if each.model == "own"]) == 1 and not report.left_out:
        lines.append(
            "the bundle holds no other engine or precision; to put them in, export its run again "
            "with --overwrite and --format openvino or --precision int8"
        )
    if any(each.model == "dense" for each in contenders):
        lines.append(
            "vs dense: times as fast as the dense network of the same backbone at batch "
            f"{_deciding(report.best, report).batch}, which is untrained: it has no accuracy"
        )
    lines += [f"warning: {line}" for line in report.latency.warnings]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"left out: {reason}" for reason in report.left_out]
    return [*lines, f"{count_of(first.threads, 'thread')}, medians in turn, {first.device}"]


def _deciding(each: Contender, report: BenchmarkReport) -> Timing:
    """Return the timing that the aim looks at: of throughput the best batch, else the smallest."""
    if report.aim == "throughput":
        batch = max(report.best.timings, key=lambda timing: timing.images_per_s).batch
    else:
        batch = min(timing.batch for timing in each.timings)
    return next(timing for timing in each.timings if timing.batch == batch)


def _warning(report: BenchmarkReport) -> str:
    ratio = _deciding(report.best, report).dense_ratio
    return "; the dense network is faster" if ratio is not None and ratio < 1 else ""


def _percent(share: MeasuredShare | None) -> str:
    return "-" if share is None else f"{100 * share.share:.1f}"


def _ratio(timing: Timing) -> str:
    return "" if timing.dense_ratio is None else f"{timing.dense_ratio:.2f}x"


def _sources(shares: Iterable[MeasuredShare | None]) -> list[str]:
    """Return what the shares were measured on, each once."""
    return [*dict.fromkeys(f"{share.images} {share.source}" for share in shares if share)]

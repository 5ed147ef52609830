"""Tables of latencies and of how fast models are beside each other."""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType

from advmoe_deploy.cli.tables.escape import escape
from advmoe_deploy.cli.tables.fitted import FittedTable
from advmoe_deploy.reports import LatencyReport, LatencyRow
from advmoe_deploy.reports.text import count_of

_TIMES = ("batch", "p50 ms", "p90 ms", "p99 ms", "images/s", "MACs", "n")


def latency_rows(latencies: Iterable[LatencyRow]) -> FittedTable:
    """Return a table of latencies; an engine that all share is named once, above."""
    rows = [*latencies]
    engines = [f"{row.engine} {row.precision}" for row in rows]
    several = len({*engines}) > 1
    named = ("model", "engine") if several else ("model",)
    title = "latency" if several else f"latency on {engines[0]}"
    table = FittedTable(title, (*named, *_TIMES), least=("n", "p99 ms", "p90 ms", "MACs"))
    for row, engine in zip(rows, engines, strict=True):
        times = (f"{ms:.3f}" for ms in (row.p50_ms, row.p90_ms, row.p99_ms))
        table.add_row(
            *((row.model, engine) if several else (row.model,)),
            str(row.batch),
            *times,
            f"{row.images_per_s:.0f}",
            f"{row.macs / 1e6:.1f} M",
            str(row.n),
        )
    return table


def latency_report(report: LatencyReport) -> RenderableType:
    """Return the latency rows, and how fast each model is beside the others."""
    first = report.rows[0]
    setting = f"{count_of(first.threads, 'thread')}, warm-up {first.warmup}, {first.device}"
    warnings = (escape(f"warning: {line}") for line in report.warnings)
    return Group(latency_rows(report.rows), *_speeds(report), *warnings, escape(setting))


def _speeds(report: LatencyReport) -> Sequence[RenderableType]:
    if not report.ratios:
        return ()
    table = FittedTable("by the medians", ("speed", "batch", "95 %"))
    for ratio in report.ratios:
        interval = f"{ratio.ci_low:.2f} to {ratio.ci_high:.2f}"
        table.add_row(escape(ratio.words), str(ratio.batch), interval)
    return (table,)

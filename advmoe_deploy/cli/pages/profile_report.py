"""HTML page of a profile: one file that needs no other (extra ``[report]``)."""

from functools import partial
from pathlib import Path

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.pages.page import Head, render
from advmoe_deploy.cli.pages.plots import HEIGHT, draw_throughput, plot_of, subjects
from advmoe_deploy.cli.verdicts.latency import latency_verdict, macs_verdict, tone_of
from advmoe_deploy.files import write_output
from advmoe_deploy.reports import LatencyRatio, LatencyReport, LatencyRow


def write_profile_report(report: LatencyReport, bundle: Bundle, out: Path) -> None:
    """Write the page of ``report``, a profile of ``bundle``, to ``out``."""
    verdict, macs = latency_verdict(report), bundle.manifest.macs
    verdict += [macs_verdict(macs)] if report.ratios else []
    page = render(
        "pages/profile_report.html.jinja",
        Head("advmoe profile", bundle.path.resolve().name, verdict, report.warnings),
        versions=report.versions,
        threads=report.rows[0].threads,
        report=report,
        model=bundle.manifest.model,
        macs=macs,
        latency_of=latency_values(report),
    )
    write_output(out, page.encode())


def latency_values(report: LatencyReport, salt: str = "throughput") -> dict[str, object]:
    """Return what the macro ``latency`` of ``macros.html.jinja`` shows of ``report``."""
    batches = sorted({row.batch for row in report.rows})
    draw = partial(draw_throughput, report=report)
    return {
        "columns": [f"batch {batch}" for batch in batches],
        "rows": {
            name: [(row, _beside(report, row)) for row in rows]
            for name, rows in subjects(report).items()
        },
        "ratios": report.ratios,
        "throughput": plot_of(salt, draw, height=HEIGHT + 0.2 * len(subjects(report)))
        if len(batches) > 1
        else None,
        "tone": tone_of,
    }


def _beside(report: LatencyReport, row: LatencyRow) -> LatencyRatio | None:
    """Return the time of a baseline over that of the first engine's MoE."""
    first = report.rows[0]
    of = (row.model, row.engine, row.precision, row.batch, first.engine, first.precision)
    return next(
        (
            r
            for r in report.ratios
            if (r.a, r.a_engine, r.a_precision, r.batch, r.engine, r.precision) == of
        ),
        None,
    )

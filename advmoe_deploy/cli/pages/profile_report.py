"""HTML page of a profile: one file that needs no other (extra ``[report]``)."""

from pathlib import Path

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.pages.page import render
from advmoe_deploy.cli.pages.plots import latency_svg, throughput_svg
from advmoe_deploy.files import write_atomically
from advmoe_deploy.reports import LatencyReport


def write_profile_report(report: LatencyReport, bundle: Bundle, out: Path) -> None:
    """Write the page of ``report``, a profile of ``bundle``, to ``out``."""
    plots = {"latency": latency_svg(report)}
    if len({row.batch for row in report.rows}) > 1:
        plots["throughput"] = throughput_svg(report)
    page = render(
        "pages/profile_report.html.jinja",
        report=report,
        plots=plots,
        bundle=bundle.path.resolve().name,
        model=bundle.manifest.model,
        macs=bundle.manifest.macs,
    )
    write_atomically(out, page.encode())

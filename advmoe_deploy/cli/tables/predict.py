"""What ``predict`` shows on the screen."""

from rich.console import RenderableType

from advmoe_deploy.cli.tables.escape import escape
from advmoe_deploy.serving.batch import BatchReport


def batch_report(report: BatchReport) -> RenderableType:
    """Return how many inputs were classified and where the answers are."""
    resumed = f", {report.resumed} of them by an earlier run" if report.resumed else ""
    lines = [
        f"{report.images - report.errors} of {report.images} images classified{resumed}, "
        f"{report.images_per_s:.0f} images/s on {report.engine} {report.precision}: {report.output}"
    ]
    if report.errors:
        lines.append(f"note: {report.errors} unreadable; the column error says why")
    lines += [f"note: {skipped}" for skipped in report.skipped]
    return escape("\n".join(lines))

"""HTML page of an evaluation: one file that needs no other (extra ``[report]``)."""

from datetime import datetime, timezone
from pathlib import Path

from advmoe_deploy.cli.pages.page import render
from advmoe_deploy.evaluation.report import EvalReport
from advmoe_deploy.files import write_atomically
from advmoe_deploy.profiling.processor import processor_name

# Classes whose confusion matrix still fits a page.
_MATRIX, _PAIRS = 30, 20


def write_eval_report(report: EvalReport, out: Path) -> None:
    """Write the page of ``report`` to ``out``."""
    page = render(
        "pages/eval_report.html.jinja",
        report=report,
        name=Path(report.model).resolve().name,
        matrix=report.confusion if len(report.classes) <= _MATRIX else (),
        pairs=report.most_confused(_PAIRS),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        processor=processor_name(),
    )
    write_atomically(out, page.encode())

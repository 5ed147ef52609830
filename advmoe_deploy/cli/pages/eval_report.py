"""HTML page of an evaluation: one file that needs no other (extra ``[report]``)."""

from pathlib import Path

from advmoe_deploy.cli.pages.page import Head, render
from advmoe_deploy.cli.verdicts.evaluation import evaluation_verdict
from advmoe_deploy.evaluation.report import EvalReport
from advmoe_deploy.files import write_output

# Classes whose confusion matrix still fits a page.
_MATRIX, _PAIRS = 30, 20


def write_eval_report(report: EvalReport, out: Path, *, threads: int = 0) -> None:
    """Write the page of ``report`` to ``out``."""
    lost = [f"{report.unanswered} answers are not finite, and count as wrong"]
    page = render(
        "pages/eval_report.html.jinja",
        Head(
            "advmoe eval",
            Path(report.model).resolve().name,
            evaluation_verdict(report),
            [*report.warnings, *(lost if report.unanswered else ())],
        ),
        versions=report.versions,
        threads=threads,
        report=report,
        matrix=report.confusion if len(report.classes) <= _MATRIX else (),
        pairs=report.most_confused(_PAIRS),
    )
    write_output(out, page.encode())

"""Report of an analysis: JSON, PNG plots and one HTML file (extra ``[report]``)."""

from pathlib import Path

from advmoe_deploy.analysis.analyze import AnalysisReport
from advmoe_deploy.cli.pages.analysis_plots import figures_of
from advmoe_deploy.cli.pages.page import render
from advmoe_deploy.cli.pages.plots import style, svg_text
from advmoe_deploy.cli.tables.analysis import interval

HTML = "report.html"
_TEMPLATE = "pages/analysis_report.html.jinja"
_DPI = 130


def write_report(report: AnalysisReport, folder: Path, name: str) -> None:
    """Write ``report`` as the JSON file ``name``, its plots and its page into ``folder``."""
    (folder / name).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    svgs = {}
    with style():
        for plot, figure in figures_of(report).items():
            figure.savefig(folder / f"{plot}.png", dpi=_DPI)
            svgs[plot] = svg_text(figure, plot)
    html = render(_TEMPLATE, report=report, plots=svgs, interval=interval)
    (folder / HTML).write_text(html, encoding="utf-8")

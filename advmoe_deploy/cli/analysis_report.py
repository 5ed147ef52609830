"""The report of an analysis: JSON, PNG plots and one HTML file (extra ``[report]``)."""

from pathlib import Path
from typing import Any

from advmoe_deploy.analysis.analyze import AnalysisReport
from advmoe_deploy.cli.analysis_plots import figures_of
from advmoe_deploy.cli.analysis_tables import interval
from advmoe_deploy.cli.plots import require_matplotlib, style, svg_text
from advmoe_deploy.errors import missing_extra

HTML = "report.html"
_TEMPLATE = Path(__file__).with_name("analysis_report.html.jinja")
_DPI = 130


def require_libraries() -> None:
    """Raise :class:`BackendUnavailableError` now, not after the work, if one is missing."""
    require_matplotlib()
    _environment()


def write_report(report: AnalysisReport, folder: Path, name: str) -> None:
    """Write ``report`` as the JSON file ``name``, its plots and its page into ``folder``."""
    (folder / name).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    svgs = {}
    with style():
        for plot, figure in figures_of(report).items():
            figure.savefig(folder / f"{plot}.png", dpi=_DPI)
            svgs[plot] = svg_text(figure, plot)
    page = _environment().from_string(_TEMPLATE.read_text(encoding="utf-8"))
    html = page.render(report=report, plots=svgs, interval=interval)
    (folder / HTML).write_text(html, encoding="utf-8")


def _environment() -> Any:
    try:
        import jinja2
    except ImportError:
        raise missing_extra("jinja2", "report") from None
    return jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

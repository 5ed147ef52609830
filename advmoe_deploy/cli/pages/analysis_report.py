"""Report of an analysis: JSON, PNG plots and one HTML file (extra ``[report]``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from advmoe_deploy.analysis.analyze import AnalysisReport
from advmoe_deploy.analysis.routing_change import MovedImage
from advmoe_deploy.cli.pages.analysis_plots import drawings_of
from advmoe_deploy.cli.pages.page import HTML, Head, render
from advmoe_deploy.cli.pages.pictures import MOST_PICTURES, side
from advmoe_deploy.cli.pages.plots import plot_of
from advmoe_deploy.cli.tables.analysis import bound_text, interval, radius_text
from advmoe_deploy.cli.verdicts.analysis import conclusions


def write_report(
    report: AnalysisReport,
    moved: Sequence[MovedImage],
    folder: Path,
    name: str,
    *,
    threads: int = 0,
) -> None:
    """Write ``report`` as the JSON file ``name``, its plots and its page into ``folder``.

    The first few of ``moved`` are shown.
    """
    (folder / name).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    plots = {
        plot: plot_of(plot, draw, height=height, png=folder / f"{plot}.png")
        for plot, (draw, height) in drawings_of(report).items()
    }
    html = render(
        "pages/analysis_report.html.jinja",
        Head("advmoe analyze", report.recipe or report.family, conclusions(report), report.notes),
        versions=report.versions,
        threads=threads,
        report=report,
        plots=plots,
        moved=len(moved),
        shown=[_shown(image, report.class_names) for image in moved[:MOST_PICTURES]],
        interval=interval,
        bound_text=bound_text,
        radius_text=radius_text,
    )
    (folder / HTML).write_text(html, encoding="utf-8")


def _shown(image: MovedImage, names: Sequence[str]) -> dict[str, Any]:
    clean, attacked = (
        side(picture.numpy(), answer, image.label, names)
        for picture, answer in zip(image.pictures, image.answers, strict=True)
    )
    return {"image": image, "label": names[image.label], "clean": clean, "attacked": attacked}

"""Tables of figures that screen and page show alike, and the page of several runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType

from advmoe_deploy.analysis.redundancy import Withstood
from advmoe_deploy.analysis.shares import Share
from advmoe_deploy.cli.pages.page import HTML, Head, render
from advmoe_deploy.cli.pages.plots import HEIGHT, Draw, plot_of
from advmoe_deploy.cli.tables.analysis import interval
from advmoe_deploy.cli.tables.escape import escape
from advmoe_deploy.cli.tables.fitted import FittedTable
from advmoe_deploy.cli.verdicts.said import Said
from advmoe_deploy.specs import Frozen

# What is measured of every run, and of which target; the last counts all but RA-E.
WITHSTOOD = ("clean", "PGD", "RA-R", "RA-E", "PGD, all targets")
_LEAST = ("RA-E", "PGD")  # what a narrow terminal does without first
NOTE = (
    "PGD: on the model as it runs. RA-R: on its routes alone, answered by the new ones. RA-E: on "
    "experts, by the routes of the clean image, so it is about a model that nobody deploys. PGD, "
    "all targets: right under each of these but RA-E, on pathways and straight through the router. "
    "In brackets 95 % Wilson intervals; two models are told apart by the images that only one of "
    "them gets right."
)


@dataclass(frozen=True)
class Table:
    """A table: a title, the names of its columns, its rows, and what there is to say of it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Presentation:
    """All that is shown of a report: whose it is, the verdict, how it was made, figures, plots."""

    command: str
    subject: str
    verdict: Sequence[Said]
    lead: str
    tables: Sequence[Table]
    drawings: Mapping[str, Draw]


def shares(found: Withstood) -> tuple[Share, ...]:
    """Return the shares that :data:`WITHSTOOD` names."""
    attacked = (found.under("model"), found.under("router"), found.under("experts"))
    return (found.accuracy, *attacked, found.together)


def cells(found: Withstood) -> tuple[str, ...]:
    """Return them in percent, with their intervals."""
    return tuple(map(interval, shares(found)))


def so_far(found: Mapping[str, Withstood]) -> RenderableType:
    """Return what was found before it was stopped, by name."""
    rows = tuple((name, *cells(one)) for name, one in found.items())
    return drawn(Table("Measured before it was stopped", ("of", *WITHSTOOD), rows))


def drawn(table: Table) -> RenderableType:
    """Return a table for a terminal; intervals go below their figures, for want of width."""
    least = [column for column in _LEAST if column in table.columns]
    drawing = FittedTable(table.title, table.columns, least)
    for row in table.rows:
        name, *figures = map(escape, row)
        drawing.add_row(name, *(each.replace(" (", "\n(") for each in figures))
    return drawing


def screen(shown: Presentation, out: Path) -> RenderableType:
    """Return the figures and the verdict for a terminal."""
    parts: list[RenderableType] = [escape(shown.lead)]
    for table in shown.tables:
        parts += ["", drawn(table)]
    parts += [
        "",
        *(escape(said.text) for said in shown.verdict),
        "",
        escape(f"report: {out / HTML}"),
    ]
    return Group(*parts)


def write_page(
    report: Frozen,
    shown: Presentation,
    folder: Path,
    name: str,
    *,
    versions: Mapping[str, str],
    threads: int,
) -> None:
    """Write ``report`` as the JSON file ``name``, its plots and its page into ``folder``."""
    (folder / name).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    plots = [
        plot_of(plot, draw, height=HEIGHT, png=folder / f"{plot}.png")
        for plot, draw in shown.drawings.items()
    ]
    html = render(
        "several/page.html.jinja",
        Head(shown.command, shown.subject, shown.verdict),
        versions=versions,
        threads=threads,
        lead=shown.lead,
        tables=shown.tables,
        plots=plots,
    )
    (folder / HTML).write_text(html, encoding="utf-8")

"""Tables of ``report`` and ``gate``."""

from pathlib import Path

from rich.console import Group, RenderableType

from advmoe_deploy.analysis.vacuous import VACUOUS
from advmoe_deploy.cli.tables.analysis import radius_text
from advmoe_deploy.cli.tables.bundle import robust_report
from advmoe_deploy.cli.tables.escape import escape
from advmoe_deploy.cli.tables.fitted import FittedTable
from advmoe_deploy.cli.verdicts.said import percent
from advmoe_deploy.reports.text import count_of
from advmoe_deploy.settings import epsilon_text
from advmoe_deploy.verify.examples.convergence import lines_of
from advmoe_deploy.verify.examples.entry import CertifiedRoutes, Entry
from advmoe_deploy.verify.examples.gate import GateReport


def screen(entry: Entry, out: Path, card: Path | None) -> RenderableType:
    """Return the table of each engine, and what the page adds, in a line each."""
    measured = entry.advmoe
    lines = [_convergence(entry)]
    if measured.certified.certified is not None or measured.rerouted:
        sent = count_of(len(measured.rerouted), "image")
        lines.append(f"sent to other experts as they fell: {sent}")
    lines += [certified_text(measured.certified), f"written to {out}"]
    lines += [f"figures put on {card}"] if card else []
    return Group(*(robust_report(each) for each in measured.engines), *map(escape, lines))


def gate_report(report: GateReport) -> RenderableType:
    """Return a row per check of a gate, the notes and the verdict."""
    computed = f"{report.engine}, {report.report.precision}"
    title = f"{report.bundle} on {computed} against {report.baseline}, {report.images} images"
    table = FittedTable(title, ("check", "verdict", "seconds"))
    for check in report.checks:
        table.add_row(check.name, check.verdict, f"{check.seconds:.1f}")
    lines = [
        *(f"{check.name}: {check.message}" for check in report.checks),
        *(f"note: {note}" for note in report.notes),
        f"{report.verdict} in {report.seconds:.0f} s (limit: {report.max_drop:g} points)",
    ]
    return Group(table, *map(escape, lines))


def certified_text(certified: CertifiedRoutes) -> str:
    """Return of how many images the route provably cannot change, or why nobody knows."""
    if certified.certified is None:
        return f"certified routes: none known; {certified.note}"
    median = radius_text(certified.median_radius or 0.0)
    found = (
        f"certified routes: {certified.certified} of {certified.images} images keep theirs within "
        f"epsilon {epsilon_text(certified.epsilon)}; the median radius is {median}"
    )
    return f"{found}; {VACUOUS}" if certified.vacuous else found


def _convergence(entry: Entry) -> str:
    parts = []
    for line in lines_of(entry.advmoe.convergence):
        way = "as it runs" if line[0].target == "model" else "by its pathways"
        starts = f"{line[0].restarts} start{'s' if line[0].restarts > 1 else ''}"
        first, last = percent(line[0].robust_accuracy), percent(line[-1].robust_accuracy)
        parts.append(f"{way}, {starts}: {first} to {last}")
    steps = [row.steps for row in lines_of(entry.advmoe.convergence)[0]]
    return f"convergence, {steps[0]} to {steps[-1]} steps of PGD: {'; '.join(parts)}"

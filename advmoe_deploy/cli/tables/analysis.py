"""Tables of an analysis, a short screen; render.py draws them."""

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from advmoe_deploy.analysis.analyze import AnalysisReport
from advmoe_deploy.analysis.certificate import Radii
from advmoe_deploy.analysis.lipschitz import Lipschitz
from advmoe_deploy.analysis.shares import Share
from advmoe_deploy.analysis.vacuous import VACUOUS
from advmoe_deploy.cli.tables.escape import escape
from advmoe_deploy.cli.verdicts.said import percent
from advmoe_deploy.settings import epsilon_text

_MOST_LAYERS = 8
_NAMED = {"router": "router (RA-R)", "experts": "experts (RA-E)"}  # as their paper has them


def screen(report: AnalysisReport, out: Path) -> RenderableType:
    """Return the main figures of ``report``, and where the rest is."""
    return Group(sections(report), "", escape(f"report: {out / 'report.html'}"))


def sections(report: AnalysisReport) -> RenderableType:
    """Return the main figures of the sections that ``report`` has."""
    title = (
        f"{report.family}, {report.images} images of {report.data}, "
        f"l-inf epsilon {epsilon_text(report.threat.epsilon)}, PGD-{report.steps}"
    )
    parts: list[RenderableType] = [escape(title), f"clean accuracy {interval(report.accuracy)}"]
    parts += [escape(note) for note in report.notes]
    for make in (_routes, _experts, _limits, _certificates, _radii, _capacity, _smoothing):
        part = make(report)
        if part is not None:
            parts += ["", part]
    return Group(*parts)


def interval(share: Share) -> str:
    """Return a share in percent with its 95 % interval."""
    return f"{percent(share.value)} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def radii_text(radii: Radii) -> str:
    """Return what one kind of radius says, in a few words."""
    if radii.certified is None or radii.median is None:
        return radii.note
    return (
        f"{percent(radii.certified.value)} at epsilon, median radius "
        f"{radius_text(radii.median)}; {radii.note}"
    )


def radius_text(radius: float) -> str:
    """Return a certified radius, or that it is too small for any image to differ by it."""
    return "under 0.0001" if 0 < radius < 1e-4 else f"{radius:.3g}"


def bound_text(part: Lipschitz) -> str:
    """Return a formal bound, or why there is none that is of use."""
    if part.bound is None:
        return part.reason or ""
    return f"{part.bound:.3g}" if part.useful else "no useful bound"


def _routes(report: AnalysisReport) -> Table | None:
    if not report.routes:
        return None
    at_epsilon = {
        layer.layer: layer
        for effect in report.changes or ()
        if effect.attack.target == "router" and effect.epsilon == report.threat.epsilon
        for layer in effect.layers
    }
    columns = (
        "layer",
        "load, %",
        "effective routes",
        "class (chance), bits",
        "sets changed by RA-R",
    )
    table = _table("routes", columns)
    for use in report.routes[:_MOST_LAYERS]:
        total = max(1, sum(use.load))
        shares = [f"{100 * count / total:.0f}" for count in use.load]
        change = at_epsilon.get(use.layer)
        table.add_row(
            escape(use.layer),
            " ".join(shares[:8]) + (" ..." if len(shares) > 8 else ""),
            f"{use.effective_routes:.2f} of {use.experts}",
            f"{use.class_information:.2f} ({use.chance_information:.2f})",
            "-" if change is None else percent(change.set_change),
        )
    if (more := len(report.routes) - _MOST_LAYERS) > 0:
        table.add_row(f"and {more} more in the report", "", "", "", "")
    return table


def _experts(report: AnalysisReport) -> Group | None:
    experts = report.experts
    if experts is None:
        return None
    attacks = _table("accuracy under PGD, by target", ("target", "accuracy", "routes changed"))
    for row in experts.targets:
        changed = "-" if row.route_change is None else percent(row.route_change.value)
        attacks.add_row(_NAMED.get(row.target, row.target), interval(row.accuracy), changed)
    attacks.add_row("all but experts, together", interval(experts.together), "")
    columns = ("expert", "clean", "under PGD", "under APGD")
    fixed = _table("one expert for every image, beside the router's choice", columns)
    for one in (experts.gated, *experts.fixed[:_MOST_LAYERS]):
        shares = (one.clean_accuracy, one.robust_accuracy, one.apgd_accuracy)
        name = "as routed" if one.expert is None else str(one.expert)
        fixed.add_row(name, *map(interval, shares))
    second = _table("without the best expert", ("layer", "accuracy", "same answer"))
    for other in experts.second[-_MOST_LAYERS:]:
        second.add_row(escape(other.layer), interval(other.accuracy), interval(other.agreement))
    return Group(attacks, "", fixed, "", second)


def _limits(report: AnalysisReport) -> Group | None:
    if not report.lipschitz:
        return None
    table = _table(
        "Lipschitz constants of margins, l-inf", ("part", "sampled (at least)", "bound (at most)")
    )
    for part in report.lipschitz[:_MOST_LAYERS]:
        table.add_row(escape(part.part), f"{part.sampled:.3g}", escape(bound_text(part)))
    jumps = report.jumps
    if jumps is None:
        return Group(table)
    text = (
        f"at {jumps.boundaries} route boundaries logits jump by {jumps.jump_median:.3g} (median), "
        f"{jumps.jump_max:.3g} at most; the answer changes at {interval(jumps.answer_changes)}"
    )
    return Group(table, text)


def _certificates(report: AnalysisReport) -> Table | None:
    if report.certificate is None:
        return None
    table = _table("certified radii, l-inf", ("of", "worth", "result"))
    for radii in report.certificate.radii:
        table.add_row(radii.name, radii.tag, escape(radii_text(radii)))
    return table


def _radii(report: AnalysisReport) -> Table | None:
    found = report.radii
    if found is None:
        return None
    title = f"accuracy as the radius grows, {found.steps} steps; {found.macs / 1e6:.3g} M MACs"
    columns = ["radius", "accuracy", "auxiliary too", "all", "sets changed", "without the best"]
    twin = [found.twin.accuracy, *(p.accuracy for p in found.twin.points)] if found.twin else []
    if found.twin:
        title += f", its twin {found.twin.macs / 1e6:.3g} M"
        columns.append("twin")
    plain, auxiliary = found.of("model"), found.of("auxiliary")
    clean = plain[0].effect.accuracy_clean
    value = percent(clean.value)
    rows = [["0", interval(clean), value, value, "-", percent(found.second.value)]]
    rows += [
        [
            epsilon_text(one.effect.epsilon),
            interval(one.effect.accuracy_attacked),
            percent(other.effect.accuracy_attacked.value),
            percent(left.accuracy.value),
            percent(max(layer.set_change for layer in one.effect.layers)),
            percent(one.second.value),
        ]
        for one, other, left in zip(plain, auxiliary, found.standing, strict=True)
    ]
    table = _table(title, tuple(columns))
    for index, row in enumerate(rows):
        table.add_row(*row, *(percent(share.value) for share in twin[index : index + 1]))
    return table


def _capacity(report: AnalysisReport) -> Table | None:
    found = report.capacity
    if found is None:
        return None
    title = (
        f"accuracy against the room of an expert, {found.batch} images a batch, epsilon "
        f"{epsilon_text(found.epsilon)}, {found.steps} steps"
    )
    table = _table(title, ("capacity", "served", "M MACs", "clean", "attacked"))
    for point in found.points:
        table.add_row(
            f"{point.ratio:g}",
            percent(point.served),
            f"{point.macs / 1e6:.3g}",
            interval(point.accuracy),
            interval(point.robust_accuracy),
        )
    if twin := found.twin:
        shares = interval(twin.accuracy), interval(twin.robust_accuracy)
        table.add_row("twin", "-", f"{twin.macs / 1e6:.3g}", *shares)
    return table


def _smoothing(report: AnalysisReport) -> str | None:
    found = report.smoothing
    if found is None:
        return None
    return (
        f"randomized smoothing, sigma {found.settings.sigma:g}, n {found.settings.n}: accuracy "
        f"{interval(found.accuracy)}, abstains on {found.abstained} of {found.images}, "
        f"mean certified l2 radius {found.mean_radius:.3f} (at most {found.largest_radius:.3f})"
        f"{f'; {VACUOUS}' if found.vacuous else ''}"
    )


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        text = index == 0 or column in ("result", "worth", "bound (at most)")
        table.add_column(escape(column), justify="left" if text else "right")
    return table

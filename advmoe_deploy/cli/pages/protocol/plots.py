"""Plots of growing radii and of little room: V-MoE's protocol (matplotlib, extra ``[report]``)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from advmoe_deploy.analysis.analyze import AnalysisReport
from advmoe_deploy.analysis.protocol.capacity import CapacityReport
from advmoe_deploy.analysis.protocol.radii import RadiiReport
from advmoe_deploy.cli.pages.plots import DENSE, INK, MOE, S_DENSE, Draw, legend_below
from advmoe_deploy.cli.verdicts.said import percent
from advmoe_deploy.settings import epsilon_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def protocol_drawings(report: AnalysisReport) -> dict[str, Draw]:
    """Return what draws growing radii and little room, by file name."""
    found: dict[str, Draw] = {}
    if report.radii:
        found["radii"] = partial(draw_radii, report=report.radii)
        found["redundancy"] = partial(draw_redundancy, report=report.radii)
    if report.capacity:
        found["capacity"] = partial(draw_capacity, report=report.capacity)
        found["capacity-macs"] = partial(draw_capacity_macs, report=report.capacity)
    return found


def draw_radii(axes: Axes, report: RadiiReport) -> str:
    """Draw accuracy over the radius, under each attack and all, beside the dense twin's."""
    for target, label, line in (
        ("model", "on the loss", "o-"),
        ("auxiliary", "auxiliary loss, straight through the router", "^--"),
    ):
        effects = [point.effect for point in report.of(target)]  # type: ignore[arg-type]
        x = [0.0, *(effect.epsilon for effect in effects)]
        shares = [effects[0].accuracy_clean, *(effect.accuracy_attacked for effect in effects)]
        axes.plot(x, [100 * share.value for share in shares], line, color=MOE, label=label)
        low, high = ([100 * getattr(s, end) for s in shares] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=MOE, alpha=0.1, linewidth=0)
    x = [0.0, *(left.epsilon for left in report.standing)]
    together = [shares[0].value, *(left.accuracy.value for left in report.standing)]
    axes.plot(x, [100 * v for v in together], ":", color=INK, lw=1.2, label="all targets")
    if twin := report.twin:
        x = [0.0, *(point.epsilon for point in twin.points)]
        values = [twin.accuracy.value, *(point.accuracy.value for point in twin.points)]
        axes.plot(x, [100 * v for v in values], "s-", color=DENSE, label="dense twin")
    axes.set(ylim=(-2, 102), xlim=(0, None), xlabel="radius, l-inf", ylabel="accuracy, %")
    axes.set_title(f"{report.steps} steps to each radius")
    legend_below(axes)
    last = report.of("model")[-1].effect
    return f"at {epsilon_text(last.epsilon)} {percent(last.accuracy_attacked.value)} are right"


def draw_redundancy(axes: Axes, report: RadiiReport) -> str:
    """Draw redundancy and disagreement of experts over the accuracy that an attack leaves."""
    points = report.of("model")
    clean = points[0].effect.accuracy_clean.value
    x = [100 * clean, *(100 * point.effect.accuracy_attacked.value for point in points)]
    second = [report.second.value, *(point.second.value for point in points)]
    apart = [report.disagreement, *(point.disagreement for point in points)]
    axes.plot(x, [100 * v for v in second], "o-", color=MOE, label="without the best")
    axes.plot(x, [100 * v for v in apart], "s-", color=S_DENSE, label="disagree")
    axes.plot((0, 100), (0, 100), color=INK, lw=0.8, ls=":")
    axes.set(ylim=(-2, 102), xlim=(-2, 102), xlabel="accuracy under attack, %", ylabel="images, %")
    axes.set_title("Redundancy and disagreement")
    legend_below(axes)
    return (
        f"where {percent(points[-1].effect.accuracy_attacked.value)} withstand, "
        f"{percent(second[-1])} are right without their best expert, and two experts answer "
        f"{percent(apart[-1])} differently"
    )


_ACCURACIES = (("accuracy", "clean", "o-", MOE), ("robust_accuracy", "attacked", "s-", DENSE))


def draw_capacity(axes: Axes, report: CapacityReport) -> str:
    """Draw accuracy, clean and attacked, and what is served, over the capacity ratio."""
    x = [point.ratio for point in report.points]
    for name, label, line, colour in _ACCURACIES:
        shares = [getattr(point, name) for point in report.points]
        axes.plot(x, [100 * share.value for share in shares], line, color=colour, label=label)
    served = [100 * point.served for point in report.points]
    axes.plot(x, served, color=INK, lw=1.2, ls=":", label="choices served")
    axes.set(ylim=(-2, 102), xlim=(0, None), xlabel="capacity, of an even share", ylabel="%")
    axes.set_title("Little room for each expert")
    legend_below(axes)
    least = report.points[0]
    return (
        f"at {least.ratio:g} {percent(least.accuracy.value)} are right, "
        f"{percent(least.robust_accuracy.value)} attacked"
    )


def draw_capacity_macs(axes: Axes, report: CapacityReport) -> str:
    """Draw accuracy over what an image costs, the dense twin as points."""
    x = [point.macs / 1e6 for point in report.points]
    for name, label, line, colour in _ACCURACIES:
        values = [100 * getattr(point, name).value for point in report.points]
        axes.plot(x, values, line, color=colour, label=label)
        if twin := report.twin:
            value = 100 * getattr(twin, name).value
            axes.plot([twin.macs / 1e6], [value], "*", ms=14, color=colour, label=f"twin, {label}")
    axes.set(ylim=(-2, 102), xlabel="million MACs, with router", ylabel="accuracy, %")
    axes.set_title("Accuracy over compute")
    legend_below(axes)
    return f"{x[0]:.3g} to {x[-1]:.3g} million MACs"

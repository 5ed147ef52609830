"""Plots of a robustness report (matplotlib, extra ``[report]``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from advmoe_deploy.cli.pages.plots import DENSE, INK, MOE, svg_of
from advmoe_deploy.verify.examples.convergence import ConvergenceRow, lines_of
from advmoe_deploy.verify.report import RobustReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def attacks_svg(report: RobustReport, salt: str) -> str:
    """Return accuracy of reference and engine as the attacks go on, one place per attack."""
    return svg_of(salt, [lambda axes: draw_attacks(axes, report)])


def convergence_svg(rows: Sequence[ConvergenceRow]) -> str:
    """Return accuracy over the steps of PGD, a line per target and number of restarts."""
    return svg_of("convergence", [lambda axes: draw_convergence(axes, rows)])


def draw_attacks(axes: Axes, report: RobustReport) -> None:
    """Draw the share of images that stand after each attack; the band is 95 % of the last."""
    pairs = [report.clean_accuracy, *(outcome.robust_accuracy for outcome in report.attacks)]
    places = range(len(pairs))
    for name, shares, colour, style in (
        ("reference", [pair.reference for pair in pairs], DENSE, "o--"),
        (report.engine, [pair.engine for pair in pairs], MOE, "s-"),
    ):
        axes.plot(places, [100 * s for s in shares], style, color=colour, ms=5, label=name)
    low, high = report.robust_interval
    axes.errorbar(
        [places[-1]], [100 * pairs[-1].engine],
        yerr=[[100 * (pairs[-1].engine - low)], [100 * (high - pairs[-1].engine)]],
        fmt="none", ecolor=INK, elinewidth=1, capsize=3,
    )  # fmt: skip
    titles = [f"{o.title}\n({o.found_on})" if o.found_on == "engine" else o.title
              for o in report.attacks]  # fmt: skip
    axes.set_xticks(places, ["clean", *titles], fontsize=8, rotation=35, ha="right")
    axes.set(ylim=(0, 104), ylabel="images that stand, %")
    axes.set_title("Accuracy as the attacks go on")
    axes.legend(loc="lower left")


def draw_convergence(axes: Axes, rows: Sequence[ConvergenceRow]) -> None:
    """Draw one line per target and number of restarts."""
    steps = sorted({row.steps for row in rows})
    colours = {"model": DENSE, "pathway": MOE}
    for line in lines_of(rows):
        target, restarts = line[0].target, line[0].restarts
        name = "as it runs" if target == "model" else "by its pathways"
        axes.plot(
            [steps.index(row.steps) for row in line],
            [100 * row.robust_accuracy for row in line],
            "o-" if restarts == 1 else "s--",
            color=colours.get(target, INK), ms=4,
            label=f"{name}, {restarts} start{'s' if restarts > 1 else ''}",
        )  # fmt: skip
    axes.set_xticks(range(len(steps)), [str(each) for each in steps])
    least = min(row.robust_accuracy for row in rows)
    axes.set(ylim=(max(0, 100 * least - 12), 102), xlabel="steps of PGD")
    axes.set_ylabel("images that stand, %")
    axes.set_title("Do more steps and restarts break more?")
    axes.legend(loc="upper right", fontsize=9)

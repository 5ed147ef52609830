"""Presentation of a dissection: its three insights in words, its figures, its plots."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from advmoe_deploy.analysis.several.dissect import Dissected, DissectionReport
from advmoe_deploy.analysis.shares import difference_of
from advmoe_deploy.cli.pages.plots import DENSE, INK, MOE, S_DENSE, UNFUSED, legend_below
from advmoe_deploy.cli.several.presentation import (
    NOTE,
    WITHSTOOD,
    Presentation,
    Table,
    cells,
    shares,
)
from advmoe_deploy.cli.tables.analysis import interval
from advmoe_deploy.cli.verdicts.said import Said, listed, percent, points
from advmoe_deploy.settings import epsilon_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEANING = {
    "standard": "router and experts trained on clean images",
    "robust router": "the router alone trained adversarially, over the standard experts",
    "robust experts": "the experts alone, under the standard router",
    "experts moved": "the experts alone, behind the robust router",
    "both": "router and experts trained adversarially",
}


def shown_dissection(report: DissectionReport) -> Presentation:
    """Return what screen and page show of ``report``."""
    return Presentation(
        "advmoe analyze --dissect",
        report.family,
        insights(report),
        f"Dissection of {report.family}: {report.images} test images of {report.data}, l-inf "
        f"epsilon {epsilon_text(report.threat.epsilon)}, PGD-{report.steps}, seed {report.seed}. "
        "Differences are told where their paired 95 % interval, of the same images, is without 0.",
        (_accuracies(report), _flips(report)),
        {
            "withstood": partial(_draw_withstood, report=report),
            "flips": partial(_draw_flips, report=report),
        },
    )


def insights(report: DissectionReport) -> list[Said]:
    """Return what each part is worth alone, which is worth more, and whether a router keeps."""
    return [
        _worth(report.of("robust router"), report, "A robust router over standard experts"),
        _worth(report.of("robust experts"), report, "Robust experts under a standard router"),
        _kept(report),
        _which(report),
        *_together(report),
    ]


def _worth(part: Dissected, report: DissectionReport, what: str) -> Said:
    """Return whether one robust part withstands more than none."""
    one, none = part.withstood.together, report.of("standard").withstood.together
    more = difference_of(one, none)
    figures = (
        f"{percent(one.value)} withstand PGD with every target, {percent(none.value)} without it, "
        f"{points(more)} apart"
    )
    router, experts = (part.withstood.under(target) for target in ("router", "experts"))
    figures += f"; attacks on the routes alone leave {percent(router.value)}, "
    figures += f"on the experts alone {percent(experts.value)}"
    if more.low > 0:
        return Said(f"{what}: gains robustness: {figures}", "gain")
    if more.high < 0:
        return Said(f"{what}: loses robustness: {figures}", "worse")
    return Said(f"{what}: {report.images} images decide no gain or loss: {figures}", "unsure")


def _kept(report: DissectionReport) -> Said:
    """Return whether a robust router is as robust once the experts behind it are trained on."""
    before, after = report.of("robust router").flips, report.of("experts moved").flips
    more = difference_of(after, before)
    figures = (
        f"PGD on the model moves the routes of {percent(before.value)} of the images with the "
        f"experts that the router was trained with, of {percent(after.value)} once these were "
        f"trained on, {points(more)} apart"
    )
    if more.low > 0:
        return Said(f"A router's robustness is not kept as experts move: {figures}", "worse")
    if more.high < 0:
        return Said(f"A router withstands more once experts have moved: {figures}")
    return Said(
        f"Whether a router's robustness is kept as experts move, {report.images} images do not "
        f"decide: {figures}",
        "unsure",
    )


def _which(report: DissectionReport) -> Said:
    router = report.of("robust router").withstood.together
    experts = report.of("robust experts").withstood.together
    more = difference_of(experts, router)
    figures = (
        f"{percent(experts.value)} by the experts, {percent(router.value)} by the router, "
        f"{points(more)} apart"
    )
    if more.low > 0:
        return Said(f"Alone, robust experts are worth more than a robust router: {figures}")
    if more.high < 0:
        return Said(f"Alone, a robust router is worth more than robust experts: {figures}")
    return Said(
        f"Which part alone is worth more, {report.images} images do not decide: {figures}", "unsure"
    )


def _together(report: DissectionReport) -> list[Said]:
    found = [
        f"{percent(run.withstood.together.value)} of {run.recipe or run.run}"
        for run in report.runs
        if run.role == "both"
    ]
    said = f"Both parts trained adversarially: PGD with every target leaves {listed(found)}"
    return [Said(said)] if found else []


def _accuracies(report: DissectionReport) -> Table:
    return Table(
        "What each run withstands",
        ("run", *WITHSTOOD),
        tuple((_name(run), *cells(run.withstood)) for run in report.runs),
        f"{'; '.join(f'{role}: {text}' for role, text in _MEANING.items())}. {NOTE}",
    )


def _flips(report: DissectionReport) -> Table:
    return Table(
        "Images sent to other experts",
        ("run", "by PGD on the model", "by PGD on the routes"),
        tuple((_name(run), interval(run.flips), interval(run.router_flips)) for run in report.runs),
        "PGD on the model takes its gradient straight through the router and meets experts too. "
        "The scores of a router that looks at the image alone are changed by no expert: PGD on its "
        "routes finds about as much before the experts moved as after.",
    )


def _draw_withstood(axes: Axes, report: DissectionReport) -> str:
    """Draw the accuracies of each run as groups of bars."""
    colours = (INK, MOE, DENSE, S_DENSE, UNFUSED)
    width = 0.8 / len(colours)
    for index, (column, colour) in enumerate(zip(WITHSTOOD, colours, strict=True)):
        heights = [100 * shares(run.withstood)[index].value for run in report.runs]
        x = [place + (index - 2) * width for place in range(len(heights))]
        axes.bar(x, heights, width, color=colour, alpha=0.8, label=column)
    _name_runs(axes, report)
    axes.set(ylim=(0, 102), ylabel="accuracy, %")
    axes.set_title("What each run withstands")
    legend_below(axes, 3)
    return ", ".join(f"{_name(r)} {percent(r.withstood.together.value)}" for r in report.runs)


def _draw_flips(axes: Axes, report: DissectionReport) -> str:
    """Draw how many images go to other experts, by each attack."""
    for offset, colour, label, values in (
        (-0.2, MOE, "by PGD on the model", [run.flips for run in report.runs]),
        (0.2, DENSE, "on the routes", [run.router_flips for run in report.runs]),
    ):
        x = [place + offset for place in range(len(values))]
        heights = [100 * share.value for share in values]
        low = [100 * max(0.0, share.value - share.low) for share in values]
        high = [100 * max(0.0, share.high - share.value) for share in values]
        axes.bar(x, heights, 0.38, color=colour, alpha=0.8, label=label)
        axes.errorbar(x, heights, yerr=[low, high], fmt="none", ecolor=INK, capsize=3)
    _name_runs(axes, report)
    axes.set(ylim=(0, 102), ylabel="images, %")
    axes.set_title("Sent to other experts")
    legend_below(axes)
    return ", ".join(f"{_name(run)} {percent(run.flips.value)}" for run in report.runs)


def _name_runs(axes: Axes, report: DissectionReport) -> None:
    names = [_name(run).replace(" ", "\n", 1) for run in report.runs]
    axes.set_xticks(range(len(names)), names, fontsize=11)


def _name(run: Dissected) -> str:
    return run.recipe or run.run if run.role == "both" else run.role

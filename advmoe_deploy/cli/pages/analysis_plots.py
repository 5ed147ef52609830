"""Plots of an analysis, as figures (matplotlib, extra ``[report]``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from advmoe_deploy.analysis.analyze import AnalysisReport
from advmoe_deploy.analysis.redundancy import ExpertReport
from advmoe_deploy.analysis.routes import LayerUse
from advmoe_deploy.analysis.routing_change import AttackEffect, LayerChange
from advmoe_deploy.analysis.shares import Share
from advmoe_deploy.analysis.smoothing import SmoothingReport
from advmoe_deploy.cli.pages.plots import DENSE, EXPERT_COLOURS, INK, MOE, PALE, UNFUSED
from advmoe_deploy.reports.text import in_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RED = "#b3261e"
_HEIGHT = 4.0
_MOST_LABELS = 12  # more cells than this in a row and no number fits
_TARGET_NAMES = {
    "model": "the model as it runs",
    "straight-through": "straight-through",
    "pathway": "each pathway",
    "router": "router alone (RA-R)",
    "experts": "experts alone (RA-E)",
}


def figures_of(report: AnalysisReport) -> dict[str, Figure]:
    """Return a figure for each thing the report can show, by file name."""
    figures = {}
    if report.routes:
        uses, use = report.routes, most_telling(report.routes)
        figures["expert-load"] = _figure(
            lambda a: draw_load(a, uses), height=max(_HEIGHT, 1.2 + 0.26 * min(len(uses), 40))
        )
        height = max(_HEIGHT, 1.4 + 0.24 * min(len(use.by_class), 40))
        figures["expert-by-class"] = _figure(
            lambda a: draw_by_class(a, use, report.class_names), height=height
        )
    if report.changes:
        figures["routing-change"] = _changes_figure(report)
        layer = most_changed(report.changes, report.threat.epsilon)
        if layer is not None:
            figures["route-margins"] = _figure(lambda a: draw_margins(a, layer))
    if report.experts:
        experts = report.experts
        figures["attack-targets"] = _figure(lambda a: draw_targets(a, experts))
        figures["fixed-experts"] = _figure(lambda a: draw_fixed(a, experts))
        figures["disagreement"] = _figure(lambda a: draw_disagreement(a, experts))
    if report.smoothing:
        smoothing = report.smoothing
        figures["smoothing"] = _figure(lambda a: draw_smoothing(a, smoothing))
    return figures


def most_telling(uses: Sequence[LayerUse]) -> LayerUse:
    """Return the layer whose routes tell most about the class."""
    return max(uses, key=lambda use: use.class_information)


def most_changed(effects: Sequence[AttackEffect], epsilon: float) -> LayerChange | None:
    """Return the layer whose routes the router attack moved most at the trained radius."""
    layers = [
        layer
        for effect in effects
        if effect.attack.target == "router" and effect.epsilon == epsilon
        for layer in effect.layers
        if layer.margins
    ]
    return max(layers, key=lambda layer: layer.set_change, default=None)


def draw_load(axes: Axes, uses: Sequence[LayerUse]) -> None:
    """Draw which share of the choices each expert gets: a bar per expert, or one per layer."""
    if len(uses) == 1:
        _draw_one_load(axes, uses[0])
    else:
        _draw_loads(axes, uses)


def _draw_one_load(axes: Axes, use: LayerUse) -> None:
    shares = [_percent_of(use.load, expert) for expert in range(use.experts)]
    colours = [_expert_colour(expert, use.experts) for expert in range(use.experts)]
    bars = axes.bar(range(use.experts), shares, 0.7, color=colours)
    if use.experts <= _MOST_LABELS:
        axes.bar_label(bars, [f"{share:.0f}" for share in shares], padding=2)
        axes.set_xticks(range(use.experts))
    axes.axhline(100 / use.experts, color=INK, lw=1, ls=":")
    axes.text(use.experts - 0.45, 100 / use.experts, "even", va="bottom", ha="right", fontsize=9)
    axes.set(xlabel="expert", ylabel="choices, %", ylim=(0, max(shares) * 1.15))
    axes.set_title(f"Expert load: {use.effective_routes:.2f} effective routes of {use.experts}")


def _draw_loads(axes: Axes, uses: Sequence[LayerUse]) -> None:
    experts = max(use.experts for use in uses)
    rows = list(range(len(uses)))
    left = [0.0] * len(uses)
    for expert in range(experts):
        shares = [_percent_of(use.load, expert) for use in uses]
        colour = _expert_colour(expert, experts)
        bars = axes.barh(
            rows, shares, 0.74, left=left, color=colour, edgecolor="white", label=f"expert {expert}"
        )
        if len(uses) <= 14:
            labels = [f"{share:.0f}" if share >= 6 else "" for share in shares]
            axes.bar_label(bars, labels, label_type="center", color="white", fontsize=9)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    names = [f"{use.layer} ({use.effective_routes:.1f})" for use in uses]
    axes.set_yticks(rows, names, fontsize=9 if len(uses) <= 8 else 7)
    axes.set_ylim(len(uses) - 0.4, -0.6)
    axes.set(xlim=(0, 100), xlabel="choices, %")
    legend = experts <= 8
    axes.set_title("Expert load by layer (effective routes)", pad=26 if legend else 6)
    if legend:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(experts, 4), fontsize=9)


def draw_by_class(axes: Axes, use: LayerUse, class_names: Sequence[str]) -> None:
    """Draw the share of each class's choices that each expert gets."""
    table = [[_percent_of(row, e) for e in range(use.experts)] for row in use.by_class]
    picture = axes.imshow(table, aspect="auto", cmap="Greens", vmin=0, vmax=100)
    axes.set_xticks(range(use.experts), [str(e) for e in range(use.experts)])
    every = max(1, -(-len(class_names) // 40))  # of many classes, every second or third name
    axes.set_yticks(
        range(0, len(class_names), every),
        [in_plot(name) for name in class_names[::every]],
        fontsize=9,
    )
    axes.set(xlabel="expert", ylabel="class")
    axes.set_title(f"Experts by class: {use.layer}")
    if use.experts <= _MOST_LABELS and len(table) <= 20:
        _write_cells(axes, table, dark_above=55)
    bar = axes.figure.colorbar(picture, ax=axes, shrink=0.85)
    bar.set_label("choices of the class, %")
    _no_frame(axes)


def draw_changes(axes: Axes, effects: Sequence[AttackEffect], title: str) -> None:
    """Draw how far sets of chosen experts and answers change as the radius grows."""
    effects = sorted(effects, key=lambda effect: effect.epsilon)
    epsilons = [0.0, *(effect.epsilon for effect in effects)]
    layers = [layer.layer for layer in effects[0].layers]
    for index, name in enumerate(layers):
        changed = [0.0, *(100 * effect.layers[index].set_change for effect in effects)]
        colour = _expert_colour(index, len(layers))
        axes.plot(epsilons, changed, "o-", color=colour, ms=4, label=f"routes, {name}")
    answers = [0.0, *(100 * effect.prediction_change.value for effect in effects)]
    axes.plot(epsilons, answers, "s--", color=INK, ms=4, lw=1.2, label="answers")
    axes.set(ylim=(-2, 102), xlim=(0, None), xlabel="epsilon (l-inf, pixels in [0, 1])")
    axes.set_ylabel("changed, %")
    axes.set_title(title)
    if len(layers) <= 8:
        axes.legend(loc="upper left", fontsize=9)


def draw_margins(axes: Axes, change: LayerChange) -> None:
    """Draw the distance of scores from a change of route, clean and attacked."""
    assert change.margins is not None
    edges = change.margins.edges
    total = sum(change.margins.clean)
    for counts, colour, label in (
        (change.margins.clean, MOE, "clean"),
        (change.margins.attacked, _RED, "routes attacked"),
    ):
        shares = [100 * count / total for count in counts]
        axes.stairs(shares, edges, color=colour, lw=1.6, label=label)
        axes.stairs(shares, edges, color=colour, fill=True, alpha=0.18)
    axes.set(xlabel="route margin, scores (last bin: all above)", ylabel="rows, %", xlim=(0, None))
    axes.set_title(f"How clear routes are: {change.layer}")
    axes.legend(loc="upper right")


def draw_targets(axes: Axes, report: ExpertReport) -> None:
    """Draw accuracy under each target, the clean one first and all together last."""
    rows: list[tuple[str, Share, str]] = [("clean", report.accuracy, MOE)]
    for row in report.targets:
        colour = DENSE if row.target == "experts" else "#3d6fb6"
        rows.append((_TARGET_NAMES[row.target], row.accuracy, colour))
    rows.append(("all on the whole model", report.together, INK))
    positions = list(range(len(rows)))
    values = [100 * share.value for _, share, _ in rows]
    axes.barh(positions, values, 0.66, color=[colour for _, _, colour in rows])
    _whiskers(axes, [share for _, share, _ in rows], positions, horizontal=True)
    for position, (_, share, _) in zip(positions, rows, strict=True):
        axes.text(
            min(100 * share.high, 101) + 1.5, position, f"{100 * share.value:.1f}",
            va="center", fontsize=9,
        )  # fmt: skip
    axes.set_yticks(positions, [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.set(xlim=(0, 112), xlabel="accuracy, %")
    axes.set_xticks(range(0, 101, 20))
    axes.set_title("Accuracy by what PGD gets hold of")


def draw_fixed(axes: Axes, report: ExpertReport) -> None:
    """Draw clean and robust accuracy of each expert alone, beside those of the routed model."""
    positions = list(range(len(report.fixed)))
    for offset, colour, label, shares in (
        (-0.2, MOE, "clean", [row.clean_accuracy for row in report.fixed]),
        (0.2, DENSE, "under PGD", [row.robust_accuracy for row in report.fixed]),
    ):
        at = [position + offset for position in positions]
        axes.bar(at, [100 * share.value for share in shares], 0.38, color=colour, label=label)
        _whiskers(axes, shares, at, horizontal=False)
    routed = next(row.accuracy for row in report.targets if row.target == "model")
    for share, colour, style in ((report.accuracy, MOE, "--"), (routed, DENSE, "--")):
        axes.axhline(100 * share.value, color=colour, lw=1.4, ls=style)
    axes.plot([], [], color=INK, lw=1.4, ls="--", label="routed model")
    axes.set_xticks(positions, [str(row.expert) for row in report.fixed])
    axes.set(ylim=(0, 118), xlabel="expert that takes every image", ylabel="accuracy, %")
    axes.set_yticks(range(0, 101, 20))
    axes.set_title("Fixed experts against the routed model")
    axes.legend(loc="upper center", ncols=3, fontsize=9)


def draw_disagreement(axes: Axes, report: ExpertReport) -> None:
    """Draw the share of images that two fixed experts answer differently."""
    table = [[100 * value for value in row] for row in report.disagreement]
    picture = axes.imshow(table, cmap="Purples", vmin=0, vmax=100)
    ticks, names = range(len(table)), [str(row.expert) for row in report.fixed]
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    axes.set(xlabel="expert", ylabel="expert")
    axes.set_title("Images that two experts answer differently")
    if len(table) <= _MOST_LABELS:
        _write_cells(axes, table, dark_above=55)
    axes.figure.colorbar(picture, ax=axes, shrink=0.85).set_label("images, %")
    _no_frame(axes)


def draw_smoothing(axes: Axes, report: SmoothingReport) -> None:
    """Draw certified accuracy over the l2 radius."""
    curve = report.curve
    accuracy = [100 * value for value in curve.accuracy]
    axes.plot(curve.radius, accuracy, color=MOE, lw=2)
    axes.fill_between(curve.radius, accuracy, color=MOE, alpha=0.13, linewidth=0)
    axes.axvline(report.largest_radius, color=UNFUSED, lw=1, ls=":")
    axes.text(
        report.largest_radius, 101, f"most that {report.settings.n} noises can show ",
        ha="right", va="top", fontsize=9, color="#52606d",
    )  # fmt: skip
    axes.set(ylim=(0, 102), xlim=(0, 1.04 * report.largest_radius), ylabel="certified accuracy, %")
    axes.set_xlabel("l2 radius, pixels in [0, 1]")
    axes.set_title(f"Randomized smoothing, sigma {report.settings.sigma:g}")


def _changes_figure(report: AnalysisReport) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.8, _HEIGHT), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    titles = {"model": "Attack on the answer", "router": "Attack on the routes alone"}
    for axes, (target, title) in zip(panels, titles.items(), strict=True):
        effects = [e for e in report.changes or () if e.attack.target == target]
        draw_changes(axes, effects, title)
        axes.axvline(report.threat.epsilon, color=PALE, lw=1.2, zorder=0)
        axes.text(report.threat.epsilon, -1, " epsilon", fontsize=8, color="#52606d", va="bottom")
    return figure


def _figure(draw: Callable[[Axes], None], *, height: float = _HEIGHT) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    draw(figure.subplots())
    return figure


def _whiskers(
    axes: Axes, shares: Sequence[Share], positions: Sequence[float], *, horizontal: bool
) -> None:
    """Draw 95 % intervals."""
    low = [100 * max(0.0, share.value - share.low) for share in shares]
    high = [100 * max(0.0, share.high - share.value) for share in shares]
    values = [100 * share.value for share in shares]
    style: Any = {"fmt": "none", "ecolor": INK, "elinewidth": 1, "capsize": 2.5}
    if horizontal:
        axes.errorbar(values, positions, xerr=[low, high], **style)
    else:
        axes.errorbar(positions, values, yerr=[low, high], **style)


def _write_cells(axes: Axes, table: Sequence[Sequence[float]], *, dark_above: float) -> None:
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            colour = "white" if value > dark_above else INK
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9)


def _no_frame(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _expert_colour(index: int, count: int) -> Any:
    if count <= len(EXPERT_COLOURS):
        return EXPERT_COLOURS[index]
    from matplotlib import colormaps

    return colormaps["viridis"](index / (count - 1) * 0.92)


def _percent_of(counts: Sequence[int], index: int) -> float:
    return 100 * counts[index] / max(1, sum(counts)) if index < len(counts) else 0.0

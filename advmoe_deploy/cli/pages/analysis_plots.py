"""Plots of an analysis (matplotlib, extra ``[report]``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from advmoe_deploy.analysis.analyze import AnalysisReport
from advmoe_deploy.analysis.redundancy import ExpertReport
from advmoe_deploy.analysis.routes import LayerUse
from advmoe_deploy.analysis.routing_change import AttackEffect, LayerChange
from advmoe_deploy.analysis.shares import Share
from advmoe_deploy.analysis.smoothing import SmoothingReport
from advmoe_deploy.cli.pages.plots import (
    DENSE,
    EXPERT_COLOURS,
    HEIGHT,
    INK,
    MOE,
    PAPER,
    Draw,
    legend_below,
)
from advmoe_deploy.cli.pages.protocol.plots import protocol_drawings
from advmoe_deploy.cli.verdicts.said import listed, percent
from advmoe_deploy.reports.text import in_plot
from advmoe_deploy.settings import epsilon_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LABELS = 8  # more cells than this in a row and no number fits
_MOST_LINES = 4  # layers that get a line of a colour and a name of their own
_LONGEST_NAME = 16
_TARGET_NAMES = {
    "model": "as it runs",
    "straight-through": "straight-through",
    "pathway": "each pathway",
    "router": "router (RA-R)",
    "experts": "experts (RA-E)",
}


def drawings_of(report: AnalysisReport) -> dict[str, tuple[Draw, float]]:
    """Return what draws each thing that the report can show, and its height, by file name."""
    found: dict[str, tuple[Draw, float]] = {}
    if report.routes:
        use, names = most_telling(report.routes), report.class_names
        found["expert-load"] = (
            partial(draw_load, uses=report.routes),
            2.4 + 0.3 * len(report.routes),
        )
        by_class = partial(draw_by_class, use=use, class_names=names)
        found["expert-by-class"] = by_class, _tall(min(len(use.by_class), 40))
    if report.changes:
        for target, title in (("model", "answer"), ("router", "routes")):
            effects = [e for e in report.changes if e.attack.target == target]
            drawing = partial(
                draw_changes,
                effects=effects,
                title=f"Attack on the {title}",
                epsilon=report.threat.epsilon,
            )
            found[f"attack-on-{title}"] = drawing, HEIGHT
        layer = most_changed(report.changes, report.threat.epsilon)
        if layer is not None:
            found["route-margins"] = partial(draw_margins, change=layer), HEIGHT
    if report.experts:
        for name, draw in _OF_EXPERTS.items():
            found[name] = partial(draw, report=report.experts), HEIGHT
    if report.radii:
        found["radii-routes"] = (
            partial(
                draw_changes,
                effects=[point.effect for point in report.radii.of("model")],
                title="Routes as the radius grows",
                epsilon=report.threat.epsilon,
            ),
            HEIGHT,
        )
    found.update((name, (draw, HEIGHT)) for name, draw in protocol_drawings(report).items())
    if report.smoothing:
        found["smoothing"] = partial(draw_smoothing, report=report.smoothing), HEIGHT
    return found


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


def draw_load(axes: Axes, uses: Sequence[LayerUse]) -> str:
    """Draw which share of the choices each expert gets, one bar per layer."""
    experts, rows, left = max(use.experts for use in uses), range(len(uses)), [0.0] * len(uses)
    for expert in range(experts):
        shares = [_percent_of(use.load, expert) for use in uses]
        colour = _expert_colour(expert, experts)
        bars = axes.barh(
            rows, shares, 0.74, left=left, color=colour, edgecolor=PAPER, label=f"expert {expert}"
        )
        labels = [f"{share:.0f}" if share >= 10 else "" for share in shares]
        axes.bar_label(bars, labels, label_type="center", color=PAPER)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_yticks(rows, [_layer(use.layer) for use in uses])
    axes.set(xlim=(0, 100), xlabel="choices, %", ylim=(len(uses) - 0.4, -0.6))
    axes.set_title("Expert load")
    if experts <= _MOST_LABELS:
        legend_below(axes)
    shown = (f"{use.layer} {' / '.join(map(str, use.load))}" for use in uses)
    return f"choices per expert: {', '.join(shown)}"


def draw_by_class(axes: Axes, use: LayerUse, class_names: Sequence[str]) -> str:
    """Draw the share of each class's choices that each expert gets."""
    table = [[_percent_of(row, e) for e in range(use.experts)] for row in use.by_class]
    _shaded(axes, table, numbers=use.experts <= _MOST_LABELS and len(table) <= 20)
    axes.set_xticks(range(use.experts), [str(e) for e in range(use.experts)])
    every = max(1, -(-len(class_names) // 40))  # of many classes, every second or third name
    axes.set_yticks(
        range(0, len(class_names), every), [_short(name) for name in class_names[::every]]
    )
    axes.set(xlabel=f"expert of {use.layer}", ylabel="class")
    axes.set_title("Choices by class, %")
    shown = (
        f"{name} {max(row):.0f} % to expert {row.index(max(row))}"
        for name, row in zip(class_names, table, strict=True)
    )
    return ", ".join(shown)


def draw_changes(axes: Axes, effects: Sequence[AttackEffect], title: str, epsilon: float) -> str:
    """Draw how far sets of chosen experts and answers change as the radius grows."""
    effects = sorted(effects, key=lambda effect: effect.epsilon)
    epsilons = [0.0, *(effect.epsilon for effect in effects)]
    layers = [layer.layer for layer in effects[0].layers]
    few = len(layers) <= _MOST_LINES
    for index, name in enumerate(layers):
        changed = [0.0, *(100 * effect.layers[index].set_change for effect in effects)]
        colour = _expert_colour(index, len(layers)) if few else MOE
        label = f"routes, {_layer(name)}" if few else "" if index else "routes, by layer"
        axes.plot(epsilons, changed, "o-", color=colour, alpha=1 if few else 0.5, label=label)
    answers = [0.0, *(100 * effect.prediction_change.value for effect in effects)]
    axes.plot(epsilons, answers, "s--", color=INK, lw=1.2, label="answers")
    axes.axvline(epsilon, color=INK, lw=0.8, ls=":", label="epsilon")
    axes.set(ylim=(-2, 102), xlim=(0, None), xlabel="radius, l-inf", ylabel="changed, %")
    axes.set_title(title)
    legend_below(axes)
    last = effects[-1]
    return (
        f"at radius {epsilon_text(last.epsilon)} {percent(last.route_change.value)} of the images "
        f"get other routes, {percent(last.prediction_change.value)} other answers"
    )


def draw_margins(axes: Axes, change: LayerChange) -> str:
    """Draw the distance of scores from a change of route, clean and attacked."""
    assert change.margins is not None
    edges = change.margins.edges
    total = sum(change.margins.clean)
    for counts, colour, label in (
        (change.margins.clean, MOE, "clean"),
        (change.margins.attacked, DENSE, "routes attacked"),
    ):
        shares = [100 * count / total for count in counts]
        axes.stairs(shares, edges, color=colour, lw=1.6, label=label)
        axes.stairs(shares, edges, color=colour, fill=True, alpha=0.18)
    axes.set(xlabel="margin in scores; last bin: all above", ylabel="rows, %", xlim=(0, None))
    axes.set_title(f"Route margins, {_layer(change.layer)}")
    legend_below(axes)
    return f"median {change.margin_clean:.3g} clean, {change.margin_attacked:.3g} attacked"


def draw_targets(axes: Axes, report: ExpertReport) -> str:
    """Draw accuracy under each target, the clean one first and all together last."""
    rows: list[tuple[str, Share, str]] = [("clean", report.accuracy, INK)]
    for row in report.targets:
        colour = DENSE if row.target == "experts" else MOE
        rows.append((_TARGET_NAMES[row.target], row.accuracy, colour))
    rows.append(("all together", report.together, INK))
    positions = list(range(len(rows)))
    values = [100 * share.value for _, share, _ in rows]
    axes.barh(positions, values, 0.66, color=[colour for _, _, colour in rows], alpha=0.75)
    _whiskers(axes, [share for _, share, _ in rows], positions, horizontal=True)
    axes.set_yticks(positions, [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="accuracy, %")
    axes.set_title("Accuracy by what PGD gets hold of")
    return ", ".join(f"{name} {percent(share.value)}" for name, share, _ in rows)


def draw_fixed(axes: Axes, report: ExpertReport) -> str:
    """Draw clean and robust accuracy of each expert alone, beside those of the routed model."""
    positions = list(range(len(report.fixed)))
    gated = report.gated
    for offset, colour, label, shares, of_routed in (
        (-0.2, MOE, "clean", [row.clean_accuracy for row in report.fixed], gated.clean_accuracy),
        (0.2, DENSE, "attacked", [row.withstood for row in report.fixed], gated.withstood),
    ):
        at = [position + offset for position in positions]
        axes.bar(at, [100 * s.value for s in shares], 0.38, color=colour, alpha=0.75, label=label)
        _whiskers(axes, shares, at, horizontal=False)
        value = 100 * of_routed.value
        axes.axhline(value, color=colour, lw=1.6, ls="--", label=f"routed, {label}")
    axes.set_xticks(positions, [str(row.expert) for row in report.fixed])
    axes.set(ylim=(0, 102), xlabel="expert that takes every image", ylabel="accuracy, %")
    axes.set_title("One expert for every image")
    legend_below(axes)
    shown = (
        f"expert {row.expert} {percent(row.clean_accuracy.value)} clean, "
        f"{percent(row.withstood.value)} under the stronger of PGD and APGD"
        for row in report.fixed
    )
    routed = f"{percent(gated.clean_accuracy.value)} and {percent(gated.withstood.value)}"
    return f"{', '.join(shown)}; routed {routed}"


def draw_disagreement(axes: Axes, report: ExpertReport) -> str:
    """Draw the share of images that two fixed experts answer differently."""
    table = [[100 * value for value in row] for row in report.disagreement]
    ticks, names = range(len(table)), [str(row.expert) for row in report.fixed]
    _shaded(axes, table, numbers=len(table) <= _MOST_LABELS)
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    axes.set(xlabel="expert", ylabel="expert")
    axes.set_title("Two experts answer differently, %")
    pairs = [
        f"{names[a]} and {names[b]} {table[a][b]:.0f} %" for a in ticks for b in ticks if a < b
    ]
    return listed(pairs)


_OF_EXPERTS: dict[str, Callable[..., str]] = {
    "attack-targets": draw_targets,
    "fixed-experts": draw_fixed,
    "disagreement": draw_disagreement,
}


def draw_smoothing(axes: Axes, report: SmoothingReport) -> str:
    """Draw certified accuracy over the l2 radius."""
    curve, most = report.curve, report.largest_radius
    accuracy = [100 * value for value in curve.accuracy]
    axes.plot(curve.radius, accuracy, color=MOE, lw=2)
    axes.fill_between(curve.radius, accuracy, color=MOE, alpha=0.13, linewidth=0)
    axes.axvline(most, color=INK, lw=0.8, ls=":", label=f"most {report.settings.n} noises can show")
    axes.set(ylim=(0, 102), xlim=(0, 1.04 * most), ylabel="certified, %", xlabel="radius, l2")
    axes.set_title(f"Randomized smoothing, sigma {report.settings.sigma:g}")
    legend_below(axes)
    return f"{percent(report.accuracy.value)} at 0, mean radius {report.mean_radius:.3g}"


def _tall(rows: int) -> float:
    """Return the height of a plot with a row per class or layer."""
    return max(HEIGHT, 1.5 + 0.3 * rows)


def _whiskers(
    axes: Axes, shares: Sequence[Share], positions: Sequence[float], *, horizontal: bool
) -> None:
    """Draw 95 % intervals."""
    low = [100 * max(0.0, share.value - share.low) for share in shares]
    high = [100 * max(0.0, share.high - share.value) for share in shares]
    values = [100 * share.value for share in shares]
    style: Any = {"fmt": "none", "ecolor": INK, "elinewidth": 1.2, "capsize": 3}
    if horizontal:
        axes.errorbar(values, positions, xerr=[low, high], **style)
    else:
        axes.errorbar(positions, values, yerr=[low, high], **style)


def _shaded(axes: Axes, table: Sequence[Sequence[float]], *, numbers: bool) -> None:
    """Draw percentages as shades over whatever the page is, so that ink is read on all of them."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("shades", [(*_BLUE, 0.0), (*_BLUE, 0.6)])
    picture = axes.imshow(table, aspect="auto", cmap=shades, vmin=0, vmax=100)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if not numbers:
        axes.figure.colorbar(picture, ax=axes, shrink=0.85)
        return
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.0f}", ha="center", va="center")


_BLUE = (0.24, 0.5, 0.77)


def _expert_colour(index: int, count: int) -> Any:
    if count <= len(EXPERT_COLOURS):
        return EXPERT_COLOURS[index]
    from matplotlib import colormaps

    return colormaps["viridis"](index / (count - 1) * 0.92)


def _short(name: str) -> str:
    """Return the name of a class, cut to what leaves room for the plot."""
    return in_plot(name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…")


def _layer(name: str) -> str:
    """Return the name of a layer, whose end tells more than its beginning."""
    return in_plot(name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}")


def _percent_of(counts: Sequence[int], index: int) -> float:
    return 100 * counts[index] / max(1, sum(counts)) if index < len(counts) else 0.0

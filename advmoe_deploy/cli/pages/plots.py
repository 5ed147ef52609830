"""Plots of pages and files, as SVG text (matplotlib, extra ``[report]``).

A plot is as wide as a phone, with letters of the size of the page's own. On a page its colours are
those of the style sheet, light or dark; a file is on white.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advmoe_deploy.errors import missing_extra, printable
from advmoe_deploy.process import cache_folder
from advmoe_deploy.reports import LatencyReport, LatencyRow
from advmoe_deploy.reports.text import count_of, in_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from advmoe_deploy.verify.curve import CurvePoint  # loads torch, which a profile does without

# The series and the ink; page.html.jinja has each in two shades, by these names. No green, no red:
# there these say that something was gained or lost.
MOE, DENSE, S_DENSE, UNFUSED, INK, PAPER = (
    "#1f5fa8",
    "#b4560b",
    "#7a4b94",
    "#5c6773",
    "#1b2430",
    "#ffffff",
)
MODEL_COLOURS = {"moe": MOE, "dense": DENSE, "s-dense": S_DENSE, "unfused": UNFUSED}
EXPERT_COLOURS = (MOE, DENSE, S_DENSE, "#0f7c80", UNFUSED, "#a0336a")
_VARIABLES = {INK: "ink", PAPER: "card"} | {c: f"series-{i}" for i, c in enumerate(EXPERT_COLOURS)}
_SHORT = 12  # letters of a name of which two stand beside each other
WIDTH, HEIGHT = 5.0, 3.9  # inches; on a page one is 72 pixels
_STYLE: Any = {  # matplotlib types each key as a literal
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 15.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": "medium",
    "ytick.labelsize": "medium",
    "legend.frameon": False,
    "legend.fontsize": "medium",
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "lines.markersize": 5,
}

# Draws on axes, with a title, and returns what is seen there, for those who cannot see it.
Draw = Callable[["Axes"], str]


@dataclass(frozen=True)
class Plot:
    """A plot of a page: its title, and SVG that names what it shows."""

    title: str
    svg: str


def plot_of(salt: str, draw: Draw, *, height: float = HEIGHT, png: Path | None = None) -> Plot:
    """Return the plot of a page, and keep it as ``png``; ``salt`` is unique in a page."""
    with _style():
        figure = _figure(1, height)
        axes = figure.subfigs[0].axes[0]
        seen = draw(axes)
        if png is not None:
            figure.savefig(png, dpi=200)
        title = axes.get_title(loc="left")
        axes.set_title("")  # the page's own heading
        svg = _svg_text(figure, salt, transparent=True)
    return Plot(title, _for_page(svg, f"{title}: {seen}"))


def svg_of(salt: str, panels: Sequence[Draw]) -> str:
    """Return a file of the panels side by side, on white."""
    with _style():
        figure = _figure(len(panels), HEIGHT)
        for draw, part in zip(panels, figure.subfigs, strict=True):
            draw(part.axes[0])
        return _svg_text(figure, salt, transparent=False)


def legend_below(axes: Axes, columns: int = 2) -> None:
    """Put the legend below the axes, where it covers nothing."""
    handles, names = axes.get_legend_handles_labels()
    # Of several panels each is a figure of its own.
    axes.figure.legend(handles, names, loc="outside lower left", ncols=columns)


def draw_robustness(
    axes: Axes, curves: Mapping[str, Sequence[CurvePoint]], trained_for: float | None
) -> str:
    """Draw accuracy over epsilon, one line per model, with 95 % intervals as bands."""
    for (name, points), colour in zip(curves.items(), (MOE, DENSE, S_DENSE, UNFUSED), strict=False):
        x = [point.epsilon for point in points]
        axes.plot(x, [100 * p.accuracy for p in points], "o-", color=colour, label=name)
        low, high = [100 * p.low for p in points], [100 * p.high for p in points]
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    if trained_for is not None:
        axes.axvline(trained_for, color=INK, lw=0.8, ls=":", label="trained for")
    axes.set(ylim=(0, 102), xlim=(0, None), xlabel="epsilon, l-inf", ylabel="accuracy, %")
    axes.set_title("Accuracy under a growing attack")
    legend_below(axes, 3)
    last = (f"{name} {100 * points[-1].accuracy:.0f} %" for name, points in curves.items())
    return f"at the largest epsilon, {x[-1]:g}, {', '.join(last)}"


def draw_latency(axes: Axes, report: LatencyReport) -> str:
    """Draw median times as bars, grouped by batch; the first model of each group is 1."""
    batches, models = sorted({row.batch for row in report.rows}), subjects(report)
    width, unit = 0.8 / len(models), next(iter(models))
    first = {row.batch: row.p50_ms for row in models[unit]}
    highest = 1.0
    for index, (name, rows) in enumerate(models.items()):
        x = [place + (index - (len(models) - 1) / 2) * width for place in range(len(batches))]
        heights = [row.p50_ms / first[row.batch] for row in rows]
        bars = axes.bar(x, heights, width * 0.92, color=_colour(index, rows[0]), label=name)
        axes.bar_label(bars, [f"{row.p50_ms:.3g} ms" for row in rows], padding=3, rotation=90)
        highest = max(highest, *heights)
    axes.axhline(1, color=INK, lw=0.8, ls=":")
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set(ylabel=f"time, {unit} = 1", ylim=(0, 1.75 * highest))
    axes.set_title(f"Median latency, {count_of(report.rows[0].threads, 'thread')}")
    legend_below(axes)
    return f"times of {', '.join(models)}, relative to the first"


def draw_throughput(axes: Axes, report: LatencyReport) -> str:
    """Draw images per second over the batch size; bands reach from the 10th centile of rounds."""
    models = subjects(report)
    for index, (name, rows) in enumerate(models.items()):
        colour = _colour(index, rows[0])
        batches = [row.batch for row in rows]
        axes.plot(batches, [row.images_per_s for row in rows], "o-", color=colour, label=name)
        slow = [1e3 * row.batch / row.p90_ms for row in rows]
        axes.fill_between(
            batches, slow, [row.images_per_s for row in rows], color=colour, alpha=0.08, lw=0
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set(xlabel="batch size", ylabel="images per second")
    axes.set_title("Throughput")
    legend_below(axes, 2 if max(map(len, models)) < _SHORT else 1)
    most = (f"{name} {rows[-1].images_per_s:.0f}" for name, rows in models.items())
    return f"images per second at batch {batches[-1]}: {', '.join(most)}"


def subjects(report: LatencyReport) -> dict[str, list[LatencyRow]]:
    """Return the rows of each model, ascending in batch, by as much of its name as tells apart."""
    engines = {(row.model, row.engine, row.precision) for row in report.rows}
    alone = Counter(model for model, _, _ in engines)
    found: dict[str, list[LatencyRow]] = {}
    for row in sorted(report.rows, key=lambda row: row.batch):
        own = f"{row.model}, {row.engine} {row.precision}"
        name = row.model if alone[row.model] == 1 else own
        found.setdefault(name, []).append(row)
    return found


def _colour(index: int, row: LatencyRow) -> str:
    """Return the colour of a model; of the MoE one for each engine."""
    own = row.model == "moe" and index > 0
    return EXPERT_COLOURS[-index % len(EXPERT_COLOURS)] if own else MODEL_COLOURS[row.model]


def draw_expert_load(
    axes: Axes, load_CE: Sequence[Sequence[int]], class_names: Sequence[str]
) -> str:
    """Draw which share of each class goes to which expert: one stacked bar per class."""
    left = [0.0] * len(load_CE)
    names = [in_plot(name) for name in class_names]
    for expert in range(len(load_CE[0])):
        shares = [100 * row[expert] / max(1, sum(row)) for row in load_CE]
        colour = EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]
        axes.barh(names, shares, left=left, color=colour, label=f"expert {expert}")
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="images, %", ylabel="class")
    axes.set_title("Who sees what: experts by class")
    legend_below(axes)
    favourites = (
        f"{name} {row.index(max(row))}" for name, row in zip(class_names, load_CE, strict=True)
    )
    return f"the expert that sees most of each class is {', '.join(favourites)}"


def _figure(panels: int, height: float) -> Figure:
    """Return a figure of panels side by side, each with axes of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * panels, height), layout="constrained")
    for part in figure.subfigures(1, panels, squeeze=False).flat:
        part.subplots()
    return figure


def require_matplotlib() -> Any:
    """Return matplotlib; without it, raise :class:`BackendUnavailableError` with the way out."""
    with suppress(OSError, RuntimeError):  # without a home matplotlib takes a temporary folder
        # Closed to others, as the kernels beside it must be.
        cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))
    try:
        import matplotlib
    except ImportError:
        raise missing_extra("matplotlib", "report") from None
    return matplotlib


def _style() -> Any:
    """Return the context in which the plots of this package are drawn."""
    return require_matplotlib().rc_context(_STYLE)


def _svg_text(figure: Figure, salt: str, *, transparent: bool) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):  # ids that no other plot of the page has
        figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _for_page(svg: str, seen: str) -> str:
    """Return ``svg`` as an image with an alternative text, in the colours of the style sheet."""
    named = f'<svg role="img" aria-label="{escape(printable(seen))}" viewBox='
    svg = re.sub(r"<svg[^>]*?viewBox=", lambda _: named, svg, count=1)
    return re.sub(
        "#[0-9a-f]{6}",
        lambda found: f"var(--{_VARIABLES[found[0]]})" if found[0] in _VARIABLES else found[0],
        svg,
    )

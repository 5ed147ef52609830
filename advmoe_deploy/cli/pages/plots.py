"""Plots of the HTML reports, as SVG text (matplotlib, extra ``[report]``)."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from advmoe_deploy.errors import missing_extra
from advmoe_deploy.process import cache_folder
from advmoe_deploy.reports import LatencyReport, LatencyRow
from advmoe_deploy.reports.text import in_plot
from advmoe_deploy.verify.curve import CurvePoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOE, DENSE, S_DENSE, UNFUSED, INK, PALE = (
    "#0b6e4f",
    "#8a4f7d",
    "#b3a369",
    "#9aa5b1",
    "#1f2933",
    "#d9e2ec",
)
MODEL_COLOURS = {"moe": MOE, "dense": DENSE, "s-dense": S_DENSE, "unfused": UNFUSED}
EXPERT_COLOURS = ("#0b6e4f", "#e0a526", "#3d6fb6", "#c8553d", "#7b5ea7", "#5f8f3e")
_STYLE: Any = {  # matplotlib types each key as a literal
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def robustness_svg(curves: Mapping[str, Sequence[CurvePoint]], trained_for: float | None) -> str:
    """Return accuracy over epsilon, one line per model, with 95 % intervals as bands."""
    with style():
        figure = _figure(1)
        draw_robustness(figure.axes[0], curves, trained_for)
        return svg_text(figure, "robustness")


def latency_svg(report: LatencyReport) -> str:
    """Return times per batch of the MoE and its baselines, relative to the MoE."""
    with style():
        figure = _figure(1)
        draw_latency(figure.axes[0], report)
        return svg_text(figure, "latency")


def throughput_svg(report: LatencyReport) -> str:
    """Return images per second over the batch size, one line per model."""
    with style():
        figure = _figure(1)
        draw_throughput(figure.axes[0], report)
        return svg_text(figure, "throughput")


def expert_load_svg(load_CE: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """Return which share of each class goes to which expert (C classes, E experts)."""
    with style():
        figure = _figure(1)
        draw_expert_load(figure.axes[0], load_CE, class_names)
        return svg_text(figure, "expert-load")


def summary_svg(
    curves: Mapping[str, Sequence[CurvePoint]], trained_for: float | None, report: LatencyReport
) -> str:
    """Return robustness and latency side by side."""
    with style():
        figure = _figure(2)
        draw_robustness(figure.axes[0], curves, trained_for)
        draw_latency(figure.axes[1], report)
        return svg_text(figure, "summary", transparent=False)  # it also stands on dark pages


def draw_robustness(
    axes: Axes, curves: Mapping[str, Sequence[CurvePoint]], trained_for: float | None
) -> None:
    """Draw accuracy over epsilon."""
    for (name, points), colour in zip(curves.items(), (MOE, DENSE, S_DENSE, UNFUSED), strict=False):
        x = [point.epsilon for point in points]
        axes.plot(x, [100 * p.accuracy for p in points], "o-", color=colour, ms=4, label=name)
        low, high = [100 * p.low for p in points], [100 * p.high for p in points]
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    if trained_for is not None:
        axes.axvline(trained_for, color=INK, lw=0.8, ls=":")
        axes.text(trained_for, 2, " trained for", fontsize=9, va="bottom")
    axes.set(ylim=(0, 102), xlim=(0, None), xlabel="epsilon (l-inf, pixels in [0, 1])")
    axes.set_ylabel("accuracy under PGD, %")
    axes.set_title("Accuracy under a growing attack")
    axes.legend(loc="upper right")


def draw_latency(axes: Axes, report: LatencyReport) -> None:
    """Draw median times as bars, grouped by batch; the first model of each group is 1."""
    batches, subjects = sorted({row.batch for row in report.rows}), _subjects(report)
    width, unit = 0.8 / len(subjects), next(iter(subjects))
    first = {row.batch: row.p50_ms for row in subjects[unit]}
    upright = len(batches) * len(subjects) > 8 or len(_engines(report)) > 1
    highest = 1.0
    for index, (name, rows) in enumerate(subjects.items()):
        x = [place + (index - (len(subjects) - 1) / 2) * width for place in range(len(batches))]
        heights = [row.p50_ms / first[row.batch] for row in rows]
        bars = axes.bar(x, heights, width * 0.92, color=_colour(index, rows[0]), label=name)
        labels = [f"{row.p50_ms:.3g} ms" for row in rows]
        axes.bar_label(bars, labels, fontsize=8, padding=2, rotation=90 if upright else 0)
        highest = max(highest, *heights)
    axes.axhline(1, color=INK, lw=0.8, ls=":")
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_ylabel(f"time, relative to the {report.rows[0].model}")
    columns = len(subjects) if len(_engines(report)) == 1 else 2
    lines = -(-len(subjects) // columns)
    axes.set_ylim(0, (1.1 + 0.1 * lines + 0.15 * upright) * highest)
    where = f"{report.rows[0].engine}, " if len(_engines(report)) == 1 else ""
    axes.set_title(f"Median latency, {where}{report.rows[0].threads} threads")
    axes.legend(loc="upper left", ncols=columns, fontsize=9, handlelength=1, columnspacing=1)


def draw_throughput(axes: Axes, report: LatencyReport) -> None:
    """Draw images per second over the batch size; bands reach from the 10th centile of rounds."""
    for index, (name, rows) in enumerate(_subjects(report).items()):
        colour = _colour(index, rows[0])
        batches = [row.batch for row in rows]
        axes.plot(batches, [row.images_per_s for row in rows], "o-", color=colour, ms=4, label=name)
        slow = [1e3 * row.batch / row.p90_ms for row in rows]
        axes.fill_between(
            batches, slow, [row.images_per_s for row in rows], color=colour, alpha=0.13, lw=0
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set(xlabel="batch size", ylabel="images per second")
    axes.set_title("Throughput")
    axes.legend(loc="upper left", fontsize=9, handlelength=1)


def _subjects(report: LatencyReport) -> dict[str, list[LatencyRow]]:
    """Return the rows of each model, ascending in batch, by as much of its name as tells apart."""
    several = len(_engines(report)) > 1
    subjects: dict[str, list[LatencyRow]] = {}
    for row in sorted(report.rows, key=lambda row: row.batch):
        name = f"{row.model}, {row.engine} {row.precision}" if several else row.model
        subjects.setdefault(name, []).append(row)
    return subjects


def _engines(report: LatencyReport) -> set[tuple[str, str]]:
    """Return the engines, each with its precision."""
    return {(row.engine, row.precision) for row in report.rows}


def _colour(index: int, row: LatencyRow) -> str:
    """Return the colour of a model; of the MoE one for each engine."""
    own = row.model == "moe" and index > 0
    return EXPERT_COLOURS[index % len(EXPERT_COLOURS)] if own else MODEL_COLOURS[row.model]


def draw_expert_load(
    axes: Axes, load_CE: Sequence[Sequence[int]], class_names: Sequence[str]
) -> None:
    """Draw one stacked bar per class."""
    left = [0.0] * len(load_CE)
    names = [in_plot(name) for name in class_names]
    for expert in range(len(load_CE[0])):
        shares = [100 * row[expert] / max(1, sum(row)) for row in load_CE]
        colour = EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]
        axes.barh(names, shares, left=left, color=colour, label=f"expert {expert}")
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="images, %", ylabel="class")
    axes.set_title("Who sees what: experts by class", pad=26)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(load_CE[0]), fontsize=9)


def _figure(panels: int) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * panels, 4.0), layout="constrained")
    figure.subplots(1, panels)
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


def svg_of(salt: str, panels: Sequence[Callable[[Axes], None]]) -> str:
    """Return the panels side by side, each drawn by a function; ``salt`` is unique in a page."""
    with style():
        figure = _figure(len(panels))
        for draw, axes in zip(panels, figure.axes, strict=True):
            draw(axes)
        return svg_text(figure, salt, transparent=False)


def style() -> Any:
    """Return the context in which the plots of this package are drawn."""
    return require_matplotlib().rc_context(_STYLE)


def svg_text(figure: Figure, salt: str, *, transparent: bool = True) -> str:
    """Return ``figure`` as SVG; ``salt`` is unique in a page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):  # ids that no other plot of the page has
        figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]

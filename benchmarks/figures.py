"""Draw what the benchmarks measured, from their JSON.

    python -m benchmarks.figures

Writes ``docs/figures/export_cpu.svg``.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

HERE = Path(__file__).parent
RESULT = HERE / "results" / "export_cpu.json"
FIGURE = HERE.parent / "docs" / "figures" / "export_cpu.svg"
NAMES = {
    "advmoe-2": "AdvMoE, N = 2",
    "advmoe-5": "AdvMoE, N = 5",
    "advmoe-8": "AdvMoE, N = 8",
    "advmoe-10": "AdvMoE, N = 10",
    "block-moe": "BlockMoE, k = 1",
    "conv-moe": "ConvMoE, k = 1",
    "block-moe-k2": "BlockMoE, k = 2",
    "conv-moe-k2": "ConvMoE, k = 2",
    "vit-moe": "ViT-MoE, N = 8",
}
COLOURS = {1: "#c44e52", 8: "#dd8452", 64: "#4c72b0"}
PANELS = {
    "moe / computed": "time / that of what is computed, each part alone",
    "moe / dense": "time / that of the dense network",
}


def main() -> None:
    """Draw both panels."""
    rcParams["svg.fonttype"] = "none"  # text stays text
    rows = json.loads(RESULT.read_text())["rows"]
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for panel, (ratio, label) in zip(axes, PANELS.items(), strict=True):
        draw(panel, rows, ratio, label)
    axes[0].set_yticks(range(len(NAMES)), list(NAMES.values()))
    axes[0].invert_yaxis()
    figure.legend(handles=legend(), loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(FIGURE, metadata={"Date": None})


def draw(axes: Axes, rows: list[dict[str, Any]], ratio: str, label: str) -> None:
    """Draw one ratio of every row, a line of points per case."""
    axes.axvline(1, color="#888888", linewidth=1)
    for row in rows:
        axes.plot(
            row["ratios"][ratio]["ratio"],
            list(NAMES).index(row["case"]),
            marker="o" if row["threads"] == 1 else "s",
            color=COLOURS[row["batch"]],
            markerfacecolor=COLOURS[row["batch"]] if row["load"] == "balanced" else "white",
            markersize=6,
            linestyle="none",
        )
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def legend() -> list[Line2D]:
    """Return what colours, shapes and fillings mean."""

    def entry(label: str, marker: str, colour: str, filled: bool = True) -> Line2D:
        face = colour if filled else "white"
        return Line2D(
            [], [], linestyle="none", marker=marker, color=colour, markerfacecolor=face, label=label
        )

    return [
        *(entry(f"batch {batch}", "o", colour) for batch, colour in COLOURS.items()),
        entry("2 threads", "s", "#888888"),
        entry("skewed load", "o", "#888888", filled=False),
    ]


if __name__ == "__main__":
    main()

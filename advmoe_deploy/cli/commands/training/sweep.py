"""The command ``sweep``: one recipe at several values of one setting, with a plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advmoe_deploy.cli.completion import recipes
from advmoe_deploy.cli.options import (
    Data,
    Json,
    Threads,
    names,
    positive_numbers,
    use_torch_threads,
)
from advmoe_deploy.cli.session import session
from advmoe_deploy.errors import UsageError
from advmoe_deploy.process import use_threads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType

    from advmoe_deploy.train.run.sweep import SweepReport

PLOT = "sweep.svg"


def sweep(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            autocompletion=recipes,
            help="'advmoe list recipes' names them; for a folder of your own also a family.",
        ),
    ],
    over: Annotated[
        str,
        typer.Option("--over", metavar="KEY=V1,V2,...", help="The setting and its values."),
    ],
    data: Data = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", readable=False, help="Folder of all runs; by default runs/sweep-RECIPE."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change another field; repeatable."),
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, each a run of its own.")] = "0",
    devices: Annotated[int, typer.Option("--devices", min=1, help="Processes or GPUs.")] = 1,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Train a recipe at several values of one setting; interrupted, the same command goes on."""
    key, values = _values(over)
    use_threads(threads, processes=devices)
    with session(as_json, loads=True) as ui:
        from advmoe_deploy.files import write_atomically
        from advmoe_deploy.train.request import train_request

        numbers = _seeds(seeds)
        asked = train_request(
            recipe, data=data, settings=settings or (), devices=devices, takes_out=False
        )
        folder = out or Path("runs") / f"sweep-{asked.out.name}"
        use_torch_threads(threads, processes=devices)

        from advmoe_deploy.cli.pages.plots import require_matplotlib
        from advmoe_deploy.train.run.sweep import sweep as sweep_recipe

        require_matplotlib()
        ui.resumable(has_state=folder.is_dir)
        report = sweep_recipe(
            asked.config,
            key,
            values,
            asked.data,
            folder,
            seeds=numbers,
            devices=devices,
            progress=ui.progress,
        )
        write_atomically(folder / PLOT, sweep_svg(report).encode())
        value = {**report.model_dump(mode="json"), "plot": str(folder / PLOT)}
        ui.show(value, lambda: _table(report))


def sweep_svg(report: SweepReport) -> str:
    """Return accuracies over the swept setting beside the MACs that each value costs."""
    from advmoe_deploy.cli.pages.plots import svg_of

    return svg_of(
        "sweep",
        [lambda axes: _draw_accuracy(axes, report), lambda axes: _draw_macs(axes, report)],
    )


def _draw_accuracy(axes: Axes, report: SweepReport) -> None:
    from advmoe_deploy.cli.pages.plots import DENSE, MOE

    x = [point.value for point in report.points]
    for name, colour in (("robust_accuracy", MOE), ("clean_accuracy", DENSE)):
        shares = [[100 * getattr(r, name) for r in point.reports] for point in report.points]
        means = [sum(values) / len(values) for values in shares]
        low = [mean - min(values) for mean, values in zip(means, shares, strict=True)]
        high = [max(values) - mean for mean, values in zip(means, shares, strict=True)]
        label = name.replace("_", " ")
        axes.errorbar(x, means, (low, high), fmt="o-", ms=4, capsize=3, color=colour, label=label)
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.set(xlabel=report.key, ylabel="test accuracy, %", ylim=(0, 102))
    seeds = len(report.points[0].reports)
    axes.set_title(f"{report.recipe}, {seeds} seed{'s' if seeds > 1 else ''}")
    axes.legend(loc="best")


def _draw_macs(axes: Axes, report: SweepReport) -> None:
    from advmoe_deploy.cli.pages.plots import DENSE, MOE, UNFUSED

    x = range(len(report.points))
    macs = [point.macs for point in report.points]
    selected = [m.selected / 1e6 for m in macs]
    axes.bar(x, selected, 0.6, color=MOE, label="selected experts")
    axes.bar(x, [m.router / 1e6 for m in macs], 0.6, selected, color=UNFUSED, label="router")
    axes.axhline(macs[0].dense / 1e6, color=DENSE, ls=":", label="dense")
    axes.set_xticks(x, [f"{point.value:g}" for point in report.points])
    axes.set(xlabel=report.key, ylabel="million MACs per image")
    axes.set_title("What an image costs", pad=24)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9)


def _values(over: str) -> tuple[str, tuple[float, ...]]:
    key, equals, text = over.partition("=")
    try:
        values = tuple(float(value) for value in names(text))
    except ValueError:
        values = ()
    if not equals or not values:
        raise UsageError(f"--over '{over}' is no sweep; write model.num_experts=2,4,8")
    return key, values


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(0 if seed == "0" else positive_numbers(seed, "--seeds")[0] for seed in names(text))


def _table(report: SweepReport) -> RenderableType:
    from advmoe_deploy.cli.tables.training import sweep_report

    return sweep_report(report, f"{report.out}/{PLOT}")

"""The command ``sweep``: one recipe at several values of one setting, with a plot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle, product
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
from advmoe_deploy.cli.ranges import numbers_of
from advmoe_deploy.cli.session import session
from advmoe_deploy.errors import UsageError
from advmoe_deploy.process import use_threads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType

    from advmoe_deploy.train.run.sweep import SweepReport

PLOT = "sweep.svg"
_CURVES = ("robust_accuracy", "clean_accuracy")
_MARKERS = ("o", "s", "^")


def sweep(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE[,RECIPE...]",
            autocompletion=recipes,
            help="'advmoe list recipes' names them; for a folder of your own also a family. "
            "Several are swept one after the other and drawn into one plot.",
        ),
    ],
    over: Annotated[
        str,
        typer.Option(
            "--over",
            metavar="KEY=V1,V2,...",
            help="The setting and its values; 1..10 counts by ones, 0.2..0.8 by tenths.",
        ),
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
    """Train a recipe at several values of one setting.

    Interrupted, the same command goes on.
    """
    key, values = _values(over)
    use_threads(threads, processes=devices)
    with session(as_json, loads=True) as ui:
        from advmoe_deploy.cli.pages.plots import require_matplotlib
        from advmoe_deploy.files import write_atomically
        from advmoe_deploy.train.request import require_outside, train_request
        from advmoe_deploy.train.run.swept import sweep_configs

        require = partial(sweep_configs, key=key, values=values, seeds=_seeds(seeds))
        asked = [
            train_request(
                each,
                data=data,
                settings=settings or (),
                devices=devices,
                takes_out=False,
                require=require,
            )
            for each in _recipes(recipe)
        ]
        for each in asked:  # again, for images of one's own have changed some
            require(each.config, configure=each.configure)
        named = "+".join(each.out.name for each in asked)
        folder = out or Path("runs") / f"sweep-{named}"
        for each in asked:
            require_outside(folder, each.data)
        require_matplotlib()
        use_torch_threads(threads, processes=devices)

        from advmoe_deploy.train.run.sweep import sweep as sweep_recipe

        ui.resumable(has_state=folder.is_dir)
        reports = [
            sweep_recipe(
                each.config,
                key,
                values,
                each.data,
                folder / each.out.name if len(asked) > 1 else folder,
                seeds=_seeds(seeds),
                configure=each.configure,
                devices=devices,
                progress=ui.progress,
            )
            for each in asked
        ]
        plot = folder / PLOT
        write_atomically(plot, sweep_svg(reports).encode())
        found = [report.model_dump(mode="json") for report in reports]
        value = {**found[0], "plot": str(plot)}
        if len(found) > 1:
            value = {"sweeps": found, "plot": str(plot)}
        ui.show(value, lambda: _tables(reports, plot))


def sweep_svg(reports: Sequence[SweepReport]) -> str:
    """Return accuracies over the swept setting beside the MACs that each value costs."""
    from advmoe_deploy.cli.pages.plots import svg_of

    if len(reports) > 1:
        return svg_of("sweep", [partial(_compare, reports=reports, of=of) for of in _CURVES])
    (report,) = reports
    return svg_of(
        "sweep",
        [lambda axes: _draw_accuracy(axes, report), lambda axes: _draw_macs(axes, report)],
    )


def _compare(axes: Axes, reports: Sequence[SweepReport], of: str) -> str:
    """Draw one accuracy of every recipe over the MACs that its values cost, the router counted."""
    from advmoe_deploy.cli.pages.plots import EXPERT_COLOURS, legend_below

    name = of.replace("_", " ")
    looks = product(_MARKERS, EXPERT_COLOURS)  # a colour twice has another marker
    for report, (marker, colour) in zip(reports, cycle(looks), strict=False):
        x = [point.macs.executed / 1e6 for point in report.points]
        means, errors = _means(report, of)
        axes.errorbar(
            x, means, errors, fmt=f"{marker}-", color=colour, capsize=3, label=report.recipe
        )
    axes.set(xlabel="million MACs per image, router included", ylabel="test accuracy, %")
    axes.set_title(f"{name}, over {reports[0].key}")
    legend_below(axes)
    return f"{name} of {len(reports)} recipes over multiply-accumulates"


def _means(report: SweepReport, of: str) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Return means over seeds, one a value, in percent, and how far below and above seeds lie."""
    shares = [[100 * getattr(r, of) for r in point.reports] for point in report.points]
    means = [sum(values) / len(values) for values in shares]
    low = [mean - min(values) for mean, values in zip(means, shares, strict=True)]
    high = [max(values) - mean for mean, values in zip(means, shares, strict=True)]
    return means, (low, high)


def _draw_accuracy(axes: Axes, report: SweepReport) -> str:
    from advmoe_deploy.cli.pages.plots import DENSE, MOE, legend_below

    x = [point.value for point in report.points]
    for name, colour in zip(_CURVES, (MOE, DENSE), strict=True):
        means, errors = _means(report, name)
        label = name.replace("_", " ")
        axes.errorbar(x, means, errors, fmt="o-", capsize=3, color=colour, label=label)
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.set(xlabel=report.key, ylabel="test accuracy, %", ylim=(0, 102))
    seeds = len(report.points[0].reports)
    axes.set_title(f"{report.recipe}, {seeds} seed{'s' if seeds > 1 else ''}")
    legend_below(axes)
    return f"accuracies over {report.key}"


def _draw_macs(axes: Axes, report: SweepReport) -> str:
    from advmoe_deploy.cli.pages.plots import DENSE, MOE, UNFUSED, legend_below

    x = range(len(report.points))
    macs = [point.macs for point in report.points]
    selected = [m.selected / 1e6 for m in macs]
    axes.bar(x, selected, 0.6, color=MOE, label="selected experts")
    axes.bar(x, [m.router / 1e6 for m in macs], 0.6, selected, color=UNFUSED, label="router")
    axes.axhline(macs[0].dense / 1e6, color=DENSE, ls=":", label="dense")
    axes.set_xticks(x, [f"{point.value:g}" for point in report.points])
    axes.set(xlabel=report.key, ylabel="million MACs per image")
    axes.set_title("What an image costs")
    legend_below(axes)
    return f"multiply-accumulates over {report.key}"


def _values(over: str) -> tuple[str, tuple[float, ...]]:
    key, equals, text = over.partition("=")
    try:
        values = numbers_of(text, "model.num_experts=2,4,8")
    except ValueError as error:
        raise UsageError(f"--over '{over}' is no sweep: {error}") from None
    if not equals or not values:
        raise UsageError(f"--over '{over}' is no sweep; write model.num_experts=2,4,8")
    return key, values


def _recipes(text: str) -> tuple[str, ...]:
    found = names(text)
    if not found or len(set(found)) < len(found):
        raise UsageError(
            f"'{text}' names no recipe, or one twice; write digits-advmoe,digits-at-moe"
        )
    return found


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(0 if seed == "0" else positive_numbers(seed, "--seeds")[0] for seed in names(text))


def _tables(reports: Sequence[SweepReport], plot: Path) -> RenderableType:
    from rich.console import Group

    from advmoe_deploy.cli.tables.training import sweep_report

    return Group(*(sweep_report(report, str(plot)) for report in reports))

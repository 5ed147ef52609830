"""Tables of settings, and of a run that is only planned."""

import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from advmoe_deploy.cli.tables.bundle import facts
from advmoe_deploy.cli.tables.escape import escape
from advmoe_deploy.cli.tables.fitted import FittedTable
from advmoe_deploy.train.meaning import Setting, settings_of

if TYPE_CHECKING:
    from advmoe_deploy.train.config import TrainConfig
    from advmoe_deploy.train.plan import RunPlan

# Classes that a plan counts one by one.
_CLASSES = 20


def recipe_settings(summary: str, config: "TrainConfig") -> RenderableType:
    """Return a table per group of settings; those that are not at their default stand out."""
    note = escape(f"{config.name}: {summary}. --set KEY=VALUE changes a setting.")
    return Group(note, *_groups(settings_of(config)))


def run_plan(plan: "RunPlan") -> RenderableType:
    """Return all that a training would do: settings, images by class and split, steps."""
    config = plan.config
    counts = FittedTable("images", ("class", "train", "hold-out", "test"))
    for row in plan.classes[:_CLASSES]:
        counts.add_row(escape(row.name), *(f"{n:,}" for n in (row.train, row.holdout, row.test)))
    if more := len(plan.classes[_CLASSES:]):
        counts.add_row(f"{more:,} more")
    counts.add_row("all", *(f"{n:,}" for n in plan.totals))
    rows = [
        ("data", config.data),
        ("epochs", str(config.epochs)),
        ("steps", f"{plan.steps:,} of up to {config.batch_size} images"),
        ("run", plan.out),
    ]
    chosen = [facts("chosen for these images", [*config.chosen.items()])] if config.chosen else []
    end = escape("nothing is written, nothing was trained: leave --dry-run out to begin")
    return Group(*_groups(settings_of(config)), counts, *chosen, facts(config.name, rows), end)


def _groups(settings: list[Setting]) -> list[RenderableType]:
    grouped = groupby(settings, lambda one: one.group)
    return [part for group, each in grouped for part in (_table(group, [*each]), "")]


def _table(group: str, settings: list[Setting]) -> Table:
    table = Table(title=group, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(width=28, overflow="fold")
    table.add_column(width=16, overflow="fold")
    table.add_column(overflow="fold")
    for one in settings:
        default = _text(one.default)
        kept = one.is_required or _text(one.value) == default
        table.add_row(
            escape(one.key),
            escape(_text(one.value)),
            escape(one.meaning if kept else f"{one.meaning} Default: {default}"),
            style="" if kept else "bold",
        )
    return table


def _text(value: Any) -> str:
    """Return a value as ``--set`` takes it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)

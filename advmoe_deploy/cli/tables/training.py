"""Tables of training and import, short screens; render.py draws them."""

from collections.abc import Mapping
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from advmoe_deploy.cli.tables.bundle import facts
from advmoe_deploy.cli.tables.escape import escape
from advmoe_deploy.cli.tables.fitted import FittedTable
from advmoe_deploy.cli.verdicts.said import percent
from advmoe_deploy.settings import epsilon_text

if TYPE_CHECKING:
    from advmoe_deploy.train.run.loop import TrainReport
    from advmoe_deploy.train.run.sweep import SweepReport


def train_report(report: "TrainReport", again: str) -> RenderableType:
    """Return what a training run came to, and the next step.

    ``again`` is the command that trains it with the report's remedies.
    """
    routes = report.effective_routes
    rows = [
        ("recipe", report.recipe),
        ("epochs", str(report.epochs)),
        ("clean accuracy", percent(report.clean_accuracy)),
        (
            f"robust accuracy, epsilon {epsilon_text(report.epsilon)}",
            percent(report.robust_accuracy),
        ),
        ("effective routes", "-" if routes is None else f"{routes:.2f}"),
        ("time", f"{report.seconds:.1f} s"),
    ]
    if report.nonzero_macs is not None and report.density is not None:
        left = f"{report.nonzero_macs:,}, {percent(report.density)} of the weights"
        rows.insert(-1, ("MACs that are left", left))
    hint = f"next: advmoe export {quote(report.run)} --format onnx"
    if report.remedies:
        hint = f"next: {again}\nor, as it is: advmoe export {quote(report.run)} --format onnx"
    warnings = (escape(f"warning: {line}") for line in report.warnings)
    return Group(facts(f"{report.run}", rows), *warnings, escape(hint))


def sweep_report(report: "SweepReport", plot: str) -> RenderableType:
    """Return a row per value: mean accuracies over the seeds, and MACs per image."""
    table = FittedTable(
        f"{report.recipe} over {report.key}",
        (report.key, "robust", "clean", "effective routes", "executed MACs"),
    )
    for point in report.points:
        robust = [r.robust_accuracy for r in point.reports]
        clean = [r.clean_accuracy for r in point.reports]
        routes = [r.effective_routes for r in point.reports if r.effective_routes is not None]
        table.add_row(
            f"{point.value:g}",
            percent(sum(robust) / len(robust)),
            percent(sum(clean) / len(clean)),
            f"{sum(routes) / len(routes):.2f}" if routes else "-",
            f"{point.macs.executed / 1e6:.2f} M",
        )
    return Group(table, escape(f"plot: {plot}"))


# What was done to the file on the way, where there was anything to do.
_READING = (
    "unwrapped",
    "left_out",
    "normalisation",
    "converted_to_float32",
    "batch_counts_set_to_0",
)


def import_report(value: Mapping[str, Any]) -> RenderableType:
    """Return what a checkpoint turned out to be, and the next step."""
    spec, macs = value["model"], value["macs"]
    told = {k: v for k, v in spec.items() if v is not None and v != {}}
    rows = [
        *((key, _spec_text(field)) for key, field in told.items()),
        (
            "MACs per image",
            f"{macs['executed'] / 1e6:.2f} M (selected {macs['selected'] / 1e6:.2f} + router "
            f"{macs['router'] / 1e6:.2f}); unfused {macs['unfused'] / 1e6:.2f}, "
            f"dense {macs['dense'] / 1e6:.2f}",
        ),
        *((key.replace("_", " "), _spec_text(value[key])) for key in _READING if value[key]),
    ]
    named = [name for name in value["class_names"] if not name.isdecimal()]
    known = {"classes": ", ".join(named), "data": value.get("data")}
    known["epsilon"] = epsilon_text(threat["epsilon"]) if (threat := value["threat"]) else ""
    rows += [(key, text) for key, text in known.items() if text]
    noise = "" if value.get("data") else " --data random:1000"
    hint = f"next: advmoe export {quote(value['run'])} --format onnx{noise}"
    return Group(facts(value["run"], rows), escape(hint))


def _spec_text(field: object) -> str:
    if isinstance(field, Mapping):
        return ", ".join(f"{key} {_spec_text(value)}" for key, value in field.items())
    return " ".join(map(str, field)) if isinstance(field, list) else str(field)

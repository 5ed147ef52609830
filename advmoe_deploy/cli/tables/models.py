"""Tables of models that are at hand, of runs, and of other things with names."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding

from advmoe_deploy.cli.tables.bundle import facts
from advmoe_deploy.cli.tables.escape import escape
from advmoe_deploy.cli.tables.fitted import FittedTable
from advmoe_deploy.cli.verdicts.said import percent
from advmoe_deploy.settings import epsilon_text

_COLUMNS = ("models", "data", "clean", "robust", "epsilon", "network", "MACs", "from", "size")
_LEAST = ("from", "size", "MACs")
_NO_MODELS = "none yet: advmoe add RUN --name NAME"


def name_lists(lists: Mapping[str, Sequence[Mapping[str, Any]]]) -> RenderableType:
    """Return the names of each kind with what they are."""
    return Group(
        *(
            _LISTS[kind](entries)
            if kind in _LISTS
            else facts(kind, [(entry["name"], entry["summary"]) for entry in entries])
            for kind, entries in lists.items()
        )
    )


def recipe_list(entries: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return the recipes in a group for each data set and family, the summary below each name."""
    if not entries:
        return escape("no recipe is on this data set and of this family")
    parts: list[RenderableType] = []
    for (data, family), group in groupby(entries, lambda entry: (entry["data"], entry["family"])):
        parts.append(f"[bold]{escape(f'recipes on {data}, family {family}')}[/bold]")
        for entry in group:
            parts.append(escape(f"  {entry['name']}"))
            parts.append(Padding(escape(entry["summary"]), (0, 0, 0, 6)))
    hint = "advmoe show RECIPE: every setting; list recipes --data NAME --family NAME: fewer"
    return Group(*parts, escape(hint))


def model_list(entries: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return a row per model, and below what is to be said of single ones."""
    if not entries:
        return facts("models", [(_NO_MODELS, "")])
    table = FittedTable("", _COLUMNS, _LEAST)
    notes = []
    for entry in entries:
        table.add_row(f"  {escape(entry['name'])}", *map(escape, _cells(entry)))
        if said := entry["note"] or _measured(entry):
            notes.append(f"  {entry['name']}: {said}")
    return Group(table, *map(escape, notes))


def run_contents(value: Mapping[str, Any]) -> RenderableType:
    """Return what a run's model is, and where it stands."""
    model = value["model"]
    experts = f"{model['num_experts']} experts, top {model['top_k']}, ratio {model['ratio']:g}"
    threat = value["threat"]
    rows = [
        ("network", f"{model['backbone']}, {model['family']}, {experts}"),
        ("classes", str(model["num_classes"])),
        ("images", f"{model['in_channels']} x {model['image_size']} x {model['image_size']}"),
        (
            "threat model",
            f"{threat['norm']}, epsilon {epsilon_text(threat['epsilon'])}" if threat else "-",
        ),
        ("recipe", str(value["recipe"].get("name", "-"))),
        ("data", str(value["provenance"].get("data", "-"))),
        *((f"hold-out: {name}", f"{number:.4g}") for name, number in value["metrics"].items()),
        ("weights", f"{value['bytes'] / 1e6:.2f} MB, SHA-256 {value['weights_sha256'][:12]}"),
    ]
    hint = f"next: advmoe export {value['source']} --format onnx"
    return Group(facts(value["run"], rows), escape(hint))


def added_model(value: Mapping[str, Any]) -> RenderableType:
    """Return where a model was put, what rounding did to it, and the next step."""
    rows = [("size", f"{value['bytes'] / 1e6:.2f} MB")]
    rows += [("weights", value["rounding_says"])] if value["rounding_says"] else []
    rows += [
        (f"robust accuracy, {each['by']}", percent(each["robust"]["value"]))
        for each in value["evaluations"]
    ]
    hint = f"next: advmoe export {value['source']} --format onnx"
    return Group(facts(value["folder"], rows), escape(hint))


def pushed(value: Mapping[str, Any]) -> RenderableType:
    """Return what was uploaded and where it is, or what would be."""
    title = f"{value['kind']} {value['repository']}, {value['bytes'] / 1e6:.2f} MB"
    files = facts(title, [(name, "") for name in value["files"]])
    if "out" in value:
        head = value["readme"].partition("\n# ")[0]
        return Group(files, escape(head), escape(f"nothing was uploaded; it is in {value['out']}"))
    hint = f"next: advmoe inspect hub:{value['repository']}"
    return Group(files, escape(value["commit"]), escape(hint))


def _measured(entry: Mapping[str, Any]) -> str:
    """Return which images and which attack the accuracies are of."""
    if not entry["measured_on"]:
        return ""
    attack = f"; robust: what withstands {entry['attack']}" if entry["attack"] else ""
    return f"measured on {entry['measured_on']}{attack}"


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    clean, robust = entry["clean_accuracy"], entry["robust_accuracy"]
    return (
        "unusable" if entry["note"] else entry["data"] or "-",
        "-" if clean is None else percent(clean),
        "-" if robust is None else percent(robust),
        "-" if entry["epsilon"] is None else epsilon_text(entry["epsilon"]),
        f"{entry['backbone'] or '-'} {entry['family'] or ''}".strip(),
        "-" if entry["macs"] is None else f"{entry['macs'] / 1e6:.1f} M",
        entry["source"],
        f"{entry['bytes'] / 1e6:.1f} MB",
    )


_LISTS: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], RenderableType]] = {
    "models": model_list,
    "recipes": recipe_list,
}

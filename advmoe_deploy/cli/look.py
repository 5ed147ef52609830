"""The commands that only look: inspect, list, doctor."""

import importlib.metadata
import os
import platform
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from advmoe_deploy import __version__
from advmoe_deploy.cli.options import BundlePath, Json
from advmoe_deploy.cli.session import session

# Optional package -> the extra that brings it.
OPTIONAL = {
    "onnxruntime": "cpu",
    "torch": "train",
    "lightning-fabric": "train",
    "datasets": "train",
    "onnxscript": "train",
    "pyautoattack": "train",
    "scikit-learn": "train",
    "tensorboard": "train",
    "pyarrow": "serve",
    "fastapi": "serve",
    "uvicorn": "serve",
    "jinja2": "report",
    "matplotlib": "report",
}
REQUIRED = ("numpy", "onnx", "pillow", "pydantic", "rich", "safetensors", "typer")


class Kind(str, Enum):
    """What ``list`` can list."""

    recipes = "recipes"
    models = "models"
    engines = "engines"
    data = "data"


def inspect(bundle: BundlePath, as_json: Json = False) -> None:
    """Show what a bundle holds, after checking every file's hash."""
    with session(as_json) as ui:
        from advmoe_deploy.bundle import open_bundle
        from advmoe_deploy.cli import tables

        opened = open_bundle(bundle)
        value = {"bundle": str(opened.path), **opened.manifest.model_dump(mode="json")}
        ui.show(value, lambda: tables.bundle_contents(opened))


def list_names(
    kind: Annotated[Kind | None, typer.Argument(help="By default all of them.")] = None,
    as_json: Json = False,
) -> None:
    """List recipes, models, engines and data sets."""
    with session(as_json) as ui:
        from advmoe_deploy.cli import tables

        kinds = (kind,) if kind else tuple(Kind)
        value = {one.value: _entries(one) for one in kinds}
        ui.show(value, lambda: tables.name_lists(value))


def doctor(as_json: Json = False) -> None:
    """Say what this machine has and which extra brings what is missing."""
    with session(as_json) as ui:
        from advmoe_deploy.cli import tables

        value = {
            "advmoe": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu": _cpu_name(),
            "cpus": _usable_cpus(),
            "packages": {
                **{name: {"version": _version(name), "extra": None} for name in REQUIRED},
                **{name: {"version": _version(name), "extra": e} for name, e in OPTIONAL.items()},
            },
        }
        ui.show(value, lambda: tables.doctor_report(value))


def _entries(kind: Kind) -> list[dict[str, str]]:
    match kind:
        case Kind.recipes:
            from advmoe_deploy.train.recipes import RECIPES

            return [
                _entry(name, " ".join((r.__doc__ or "").split())) for name, r in RECIPES.items()
            ]
        case Kind.models:
            return _models()
        case Kind.engines:
            from advmoe_deploy.runtime.select import ENGINES

            return [_entry(name, _first_line(engine)) for name, engine in ENGINES.items()]
        case Kind.data:
            from advmoe_deploy.data.registry import DATASETS

            return [_entry(name, "") for name in DATASETS]


def _models() -> list[dict[str, str]]:
    from advmoe_deploy.specs import Backbone, Family

    return [
        _entry(f"{family} {backbone}", "")
        for family in get_args(Family)
        for backbone in get_args(Backbone)
    ]


def _entry(name: str, summary: str) -> dict[str, str]:
    return {"name": name, "summary": summary}


def _first_line(documented: Any) -> str:
    return (getattr(documented, "__doc__", None) or "").strip().partition("\n")[0]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")

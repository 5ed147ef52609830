"""The commands that only look: inspect, list, doctor."""

import importlib.metadata
import os
import platform
from dataclasses import asdict
from typing import Annotated, get_args

import typer

from advmoe_deploy import __version__
from advmoe_deploy.cli.extras import OPTIONAL, REQUIRED
from advmoe_deploy.cli.options import BundlePath, Json
from advmoe_deploy.cli.session import session
from advmoe_deploy.errors import AdvMoEError, missing_extra, unknown_name
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.runtime.custom_ops import find_custom_ops
from advmoe_deploy.runtime.kernels.build import find_compiler

_ENGINE_SUMMARIES = {
    "onnxruntime": "the one graph, model.onnx",
    "onnxruntime-plan": "one session per segment; this package dispatches the rows",
    "onnxruntime-cuda": "the same on a GPU; needs onnxruntime-gpu",
    "onnxruntime-trt": "the same, through TensorRT where it can; needs onnxruntime-gpu",
    "openvino": "one graph per precision; of a bundle exported with --format openvino",
    "openvino-plan": "one compiled graph per segment; this package dispatches the rows",
    "tensorrt": "engines built for one GPU; of a bundle exported there with --format trt",
    "tensorrt-at-once": "up to 4 images on every expert beside the router, without a wait",
}
_DATA_SUMMARIES = {
    "digits": "1,797 handwritten digits, 8 x 8, embedded",
    "cifar10": "cifar10:PATH reads the hub's parquet files; without a path, the hub",
    "cifar100": "as cifar10, with its 100 fine labels",
    "tiny-imagenet": "200 classes, 64 x 64; as cifar10",
    "imagenet": "imagenet:PATH reads PATH/train/CLASS/* and PATH/val/CLASS/*, 224 x 224",
    "folder": "folder:PATH?size=64 reads any images laid out like that",
}


def inspect(bundle: BundlePath, as_json: Json = False) -> None:
    """Show what a bundle holds, after checking every file's hash."""
    with session(as_json) as ui:
        from advmoe_deploy.bundle import open_bundle
        from advmoe_deploy.cli import tables

        opened = open_bundle(bundle)
        value = {"bundle": str(opened.path), **opened.manifest.model_dump(mode="json")}
        ui.show(value, lambda: tables.bundle_contents(opened))


def list_names(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="One of them; by default all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List recipes, models, engines and data sets."""
    listings = {"recipes": _recipes, "models": _models, "engines": _engines, "data": _data}
    if kind is not None and kind not in listings:
        raise unknown_name("kind", kind, listings)
    with session(as_json) as ui:
        from advmoe_deploy.cli import tables

        value = {one: listings[one]() for one in ([kind] if kind else listings)}
        ui.show(value, lambda: tables.name_lists(value))


def doctor(as_json: Json = False) -> None:
    """Say what this machine has, what runs here, and which extra brings what is missing.

    Ends with 4 if no engine is installed, and with 3 if the library of our operators is not the one
    that was compiled.
    """
    with session(as_json) as ui:
        from advmoe_deploy.cli import tables
        from advmoe_deploy.runtime.gpu_path import gpu_path

        engines = {name: _version(name) for name in ("onnxruntime", "openvino")}
        custom_ops, problem = _custom_ops()
        value = {
            "advmoe": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu": processor_name(),
            "cpus": _usable_cpus(),
            "engines": engines,
            "gpu": {name: asdict(part) for name, part in gpu_path().items()},
            "compiler": find_compiler(),
            "custom_ops": custom_ops,
            "packages": {
                **{name: {"version": _version(name), "extra": None} for name in REQUIRED},
                **{name: {"version": _version(name), "extra": e} for name, e in OPTIONAL.values()},
            },
        }
        ui.show(value, lambda: tables.doctor_report(value))
    if not any(engines.values()):
        problem = problem or missing_extra("onnxruntime", "cpu")
    if problem:
        raise problem


def _custom_ops() -> tuple[dict[str, str | None], AdvMoEError | None]:
    """Return which form of our operators runs here, and what is wrong with it, if anything."""
    try:
        return find_custom_ops().as_json(), None
    except AdvMoEError as error:
        return {"form": None, "reason": str(error), "library": None}, error


def _recipes() -> list[dict[str, str]]:
    from advmoe_deploy.train.recipes import RECIPES

    return [_entry(name, f"{each.summary}; {each.figures}") for name, each in RECIPES.items()]


def _models() -> list[dict[str, str]]:
    from advmoe_deploy.families import Backbone, Family

    return [
        _entry(family, f"backbones: {', '.join(get_args(Backbone))}") for family in get_args(Family)
    ]


def _engines() -> list[dict[str, str]]:
    from advmoe_deploy.runtime.select import ENGINES

    return [_entry(name, _ENGINE_SUMMARIES.get(name, "")) for name in ENGINES]


def _data() -> list[dict[str, str]]:
    from advmoe_deploy.data.registry import DATASETS

    return [_entry(name, _DATA_SUMMARIES.get(name, "")) for name in DATASETS]


def _entry(name: str, summary: str) -> dict[str, str]:
    return {"name": name, "summary": summary}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

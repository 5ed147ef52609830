"""The command ``list``."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, get_args

import typer

from advmoe_deploy.cli.completion import KINDS, data_sets, families, kinds
from advmoe_deploy.cli.options import Json
from advmoe_deploy.cli.session import session
from advmoe_deploy.errors import UsageError, unknown_name

Entries = list[dict[str, Any]]

_ENGINE_SUMMARIES = {
    "onnxruntime": "the one graph, model.onnx",
    "onnxruntime-plan": "one session per segment; this package dispatches the rows",
    "onnxruntime-cuda": "the same on a GPU; needs onnxruntime-gpu",
    "onnxruntime-trt": "the same, through TensorRT where it can; needs onnxruntime-gpu",
    "openvino": "one graph per precision; of a bundle exported with --format openvino",
    "openvino-plan": "one compiled graph per segment; this package dispatches the rows",
    "tensorrt": "engines built for one GPU; of a bundle exported there with --format trt",
    "tensorrt-rtx": "engines for GeForce and RTX GPUs; of a bundle of --format trt-rtx",
}
_DATA_SUMMARIES = {
    "digits": "1,797 handwritten digits, 8 x 8, embedded",
    "cifar10": "cifar10:PATH reads tables, batches, shards or folders; without a path, the hub",
    "cifar100": "as cifar10, with its 100 fine labels",
    "tiny-imagenet": "200 classes, 64 x 64; as cifar10",
    "imagenet": "imagenet:PATH reads PATH/train/CLASS/* and PATH/val/CLASS/*, 224 x 224",
    "folder": "PATH, or folder:PATH?size=64, reads PATH/CLASS/*, split or not, tables and shards",
}


def list_names(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]",
            help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}; by default all.",
            autocompletion=kinds,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="NAME",
            help="Of recipes, those on this data set, such as cifar10.",
            autocompletion=data_sets,
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            "--family",
            metavar="NAME",
            help="Of recipes, those of this family of networks, such as advmoe.",
            autocompletion=families,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List recipes, families, trained models, engines and data."""
    if (data or family) and kind != "recipes":
        raise UsageError("--data and --family choose among recipes; write 'advmoe list recipes'")
    chosen = partial(_recipes, data, family)
    of_each: tuple[Callable[[], Entries], ...] = (chosen, _families, _models, _engines, _data)
    listings = dict(zip(KINDS, of_each, strict=True))
    if kind is not None and kind not in listings:
        raise unknown_name("kind", kind, listings)
    with session(as_json) as ui:
        from advmoe_deploy.cli.tables import models as tables

        value = {one: listings[one]() for one in ([kind] if kind else listings)}
        ui.show(value, lambda: tables.name_lists(value))


def _recipes(data: str | None, family: str | None) -> Entries:
    """Return the recipes on ``data`` and of ``family``, of the same data and family together."""
    from advmoe_deploy.train.recipes import RECIPES

    entries: Entries = []
    for name, each in RECIPES.items():
        config = each.make()
        entries.append(
            {
                **_entry(name, f"{each.summary}; {each.figures}"),
                "data": config.data.partition(":")[0],
                "family": config.model.family,
                "settings": config.model_dump(mode="json"),
            }
        )
    for key, wanted in (("data", data), ("family", family)):
        known = [*dict.fromkeys(entry[key] for entry in entries)]
        if wanted is not None and wanted not in known:
            raise unknown_name(f"{key} of recipes", wanted, known)
    groups: dict[str, dict[str, Entries]] = {}
    for entry in entries:
        if data in (None, entry["data"]) and family in (None, entry["family"]):
            groups.setdefault(entry["data"], {}).setdefault(entry["family"], []).append(entry)
    return [entry for part in groups.values() for group in part.values() for entry in group]


def _models() -> Entries:
    from advmoe_deploy.zoo.entries import listed_models

    return [model.model_dump(mode="json") for model in listed_models()]


def _families() -> Entries:
    from advmoe_deploy.families import Backbone, Family

    return [
        _entry(family, f"backbones: {', '.join(get_args(Backbone))}") for family in get_args(Family)
    ]


def _engines() -> Entries:
    from advmoe_deploy.runtime.select import ENGINES

    return [_entry(name, _ENGINE_SUMMARIES.get(name, "")) for name in ENGINES]


def _data() -> Entries:
    from advmoe_deploy.data.registry import DATASETS

    return [_entry(name, _DATA_SUMMARIES.get(name, "")) for name in DATASETS]


def _entry(name: str, summary: str) -> dict[str, str]:
    return {"name": name, "summary": summary}

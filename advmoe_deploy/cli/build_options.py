"""The options ``--build-config`` and ``--set-build`` of ``export --format trt`` and ``trt-rtx``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.errors import DataError
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.settings import Fields, checked_model, dotted_keys, put_setting

BuildConfig = Annotated[
    Path | None,
    typer.Option(
        "--build-config",
        readable=False,
        metavar="FILE",
        help="trt, trt-rtx: build options, as JSON.",
    ),
]
SetBuild = Annotated[
    list[str] | None,
    typer.Option(
        "--set-build",
        metavar="KEY=VALUE",
        help="trt, trt-rtx: one build option, such as batch.max=256; repeatable.",
    ),
]
OnnxOnly = Annotated[
    bool,
    typer.Option(
        "--onnx-only",
        help="trt: write graphs and a script that build the engines on another machine.",
    ),
]


def build_options(file: Path | None, settings: Sequence[str]) -> BuildOptions:
    """Return the build options of ``file`` with ``settings`` applied.

    Raises:
        UsageError: an option is unknown, or its value makes no sense.
        DataError: the file holds no JSON object.
    """
    fields = _read(file) if file else {}
    known = dotted_keys(BuildOptions().model_dump())
    for setting in settings:
        put_setting(fields, setting, known)
    for key in ("tactic_sources", "compute_capabilities"):
        if isinstance(value := fields.get(key), (str, float)):  # 8.6 is read as a number
            fields[key] = str(value).split(",")
    return checked_model(BuildOptions, fields)


def _read(file: Path) -> Fields:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise DataError(f'{file} holds no JSON object; write {{"batch": {{"max": 256}}}}, say')
    return fields

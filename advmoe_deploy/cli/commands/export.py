"""The command ``export``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from advmoe_deploy.bundle import MANIFEST, Bundle
from advmoe_deploy.cli.build_options import BuildConfig, OnnxOnly, SetBuild, build_options
from advmoe_deploy.cli.options import ClassMap, Data, Json, Overwrite, Threads, use_torch_threads
from advmoe_deploy.cli.session import Session, session
from advmoe_deploy.errors import UsageError, unknown_name
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.specs import FORMATS, Precision


def export(
    run: Annotated[
        Path,
        typer.Argument(
            readable=False,
            metavar="RUN",
            help="What 'advmoe train' wrote; for trt also a bundle that --onnx-only wrote.",
        ),
    ],
    to: Annotated[str, typer.Option("--format", help="onnx, openvino or trt.")],
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            metavar="P",
            help="fp32, fp16, bf16 or int8; repeatable, the first rules.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", readable=False, help="By default RUN/bundle, or BUNDLE-trt."),
    ] = None,
    data: Data = None,
    class_map: ClassMap = None,
    overwrite: Overwrite = False,
    reference: Annotated[
        bool,
        typer.Option("--reference/--no-reference", help="Ship the weights that verify attacks."),
    ] = True,
    onnx_only: OnnxOnly = False,
    build_config: BuildConfig = None,
    set_build: SetBuild = None,
    prune_unused: Annotated[
        bool,
        typer.Option("--prune-unused", help="Leave out experts that no image visits; declared."),
    ] = False,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Export a trained model to a bundle, checked against the model before it is written."""
    if to not in FORMATS.values():
        raise unknown_name("format", to, FORMATS.values())
    precisions = [_precision(name) for name in dict.fromkeys(precision or ())]
    build = build_options(build_config, set_build or ())
    _require_for_trt(to, precisions, build, onnx_only=onnx_only)
    if (run / MANIFEST).is_file():
        given = {"--data": data, "--no-reference": not reference, "--prune-unused": prune_unused}
        given |= {"--class-map": class_map, "--onnx-only": onnx_only}
        _require_for_bundle(to, given)
    use_torch_threads(threads)
    with session(as_json) as ui:
        from advmoe_deploy import api
        from advmoe_deploy.data.matching import read_class_map

        bundle = api.export(
            run,
            out,
            format=to,
            precisions=precisions,
            data=data,
            class_map=read_class_map(class_map),
            overwrite=overwrite,
            with_reference=reference,
            onnx_only=onnx_only,
            build=build,
            prune_unused=prune_unused,
            progress=ui.progress,
        )
        _show(ui, bundle)


def _require_for_trt(
    to: str, precisions: Sequence[Precision], build: BuildOptions, *, onnx_only: bool
) -> None:
    if to != "trt" and (onnx_only or build != BuildOptions()):
        raise UsageError(f"--onnx-only and build options go with --format trt, not {to}")
    if build.unquantised_dtype != "fp32" and "int8" not in precisions:
        raise UsageError("unquantised_dtype goes with --format trt --precision int8")


def _require_for_bundle(to: str, given: Mapping[str, object]) -> None:
    if to != "trt":
        raise UsageError(
            f"this is a bundle, and only engines of --format trt are built of one; for {to} name "
            "the run"
        )
    if asked := [option for option, value in given.items() if value]:
        raise UsageError(f"{', '.join(asked)} goes with a run, and this is a bundle; leave it out")


def _show(ui: Session, bundle: Bundle) -> None:
    from advmoe_deploy.cli.tables import bundle as tables

    manifest = bundle.manifest
    value = {
        "bundle": str(bundle.path),
        "parity": manifest.parity.model_dump(mode="json"),
        "pruning": manifest.pruning and manifest.pruning.model_dump(mode="json"),
        "denormal_weights": manifest.denormal_weights,
        "engines": [e.model_dump(mode="json", exclude={"plan", "files"}) for e in manifest.engines],
        "macs": manifest.macs.model_dump(mode="json"),
        "bytes": sum(record.bytes for record in manifest.files.values()),
    }
    ui.show(value, lambda: tables.export_report(bundle))


def _precision(name: str) -> Precision:
    for known in get_args(Precision):
        if name == known:
            return cast(Precision, known)
    raise unknown_name("precision", name, get_args(Precision))

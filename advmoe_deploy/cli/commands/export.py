"""The command ``export``."""

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from advmoe_deploy.bundle import MANIFEST, Bundle, open_bundle
from advmoe_deploy.cli.commands import tensorrt_options
from advmoe_deploy.cli.options import Data, Json, Overwrite
from advmoe_deploy.cli.session import Session, session
from advmoe_deploy.errors import unknown_name
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.specs import Backend, Precision

FORMATS: dict[str, Backend] = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "trt": "tensorrt",
}


def export(
    run: Annotated[
        Path,
        typer.Argument(
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
        Path | None, typer.Option("--out", help="By default RUN/bundle, or BUNDLE-trt.")
    ] = None,
    data: Data = None,
    overwrite: Overwrite = False,
    reference: Annotated[
        bool,
        typer.Option("--reference/--no-reference", help="Ship the weights that verify attacks."),
    ] = True,
    onnx_only: tensorrt_options.OnnxOnly = False,
    tf32: tensorrt_options.Tf32 = False,
    workspace_mib: tensorrt_options.WorkspaceMib = None,
    optimization_level: tensorrt_options.OptimizationLevel = None,
    version_compatible: tensorrt_options.VersionCompatible = False,
    refittable: tensorrt_options.Refittable = False,
    tactic_sources: tensorrt_options.TacticSources = None,
    around_int8: tensorrt_options.AroundInt8 = "fp32",
    batch_min: tensorrt_options.BatchMin = None,
    batch_opt: tensorrt_options.BatchOpt = None,
    batch_max: tensorrt_options.BatchMax = None,
    batch_min_profile: tensorrt_options.BatchMinProfile = True,
    prune_unused: Annotated[
        bool,
        typer.Option("--prune-unused", help="Leave out experts that no image visits; declared."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Export a trained model to a bundle, checked against the model before it is written."""
    if to not in FORMATS:
        raise unknown_name("format", to, FORMATS)
    precisions = [_precision(name) for name in dict.fromkeys(precision or ["fp32"])]
    build = BuildOptions(
        batch=tensorrt_options.batch_profile(batch_min, batch_opt, batch_max),
        tf32=tf32,
        workspace_mib=workspace_mib,
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        refittable=refittable,
        tactic_sources=tensorrt_options.sources(tactic_sources),
        batch_min_profile=batch_min_profile,
    )
    tensorrt_options.require_for_trt(to, build, onnx_only=onnx_only)
    around = tensorrt_options.around_int8(around_int8, precisions, to)
    is_bundle = (run / MANIFEST).is_file()
    if is_bundle:
        given = {"--data": data, "--no-reference": not reference, "--prune-unused": prune_unused}
        given |= {"--onnx-only": onnx_only, "--around-int8": around != "fp32"}
        tensorrt_options.require_for_bundle(to, given)
    with session(as_json) as ui:
        if is_bundle:
            from advmoe_deploy.export.tensorrt.from_bundle import build_from_bundle

            bundle = build_from_bundle(
                open_bundle(run),
                out or run.resolve().with_name(f"{run.resolve().name}-trt"),
                build=build,
                precisions=precisions if precision else (),
                overwrite=overwrite,
                progress=ui.progress,
            )
        else:
            from advmoe_deploy.export.from_run import export_onnx
            from advmoe_deploy.export.targets import Target

            targets = [Target(FORMATS[to], each, onnx_only, build, around) for each in precisions]
            bundle = export_onnx(
                run,
                out or run / "bundle",
                data=data,
                overwrite=overwrite,
                with_reference=reference,
                targets=[t for t in targets if (t.backend, t.precision) != ("onnxruntime", "fp32")],
                precision=precisions[0],
                prune_unused=prune_unused,
                progress=ui.progress,
            )
        _show(ui, bundle)


def _show(ui: Session, bundle: Bundle) -> None:
    from advmoe_deploy.cli.tables import bundle as tables

    manifest = bundle.manifest
    value = {
        "bundle": str(bundle.path),
        "parity": manifest.parity.model_dump(mode="json"),
        "pruning": manifest.pruning and manifest.pruning.model_dump(mode="json"),
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

"""The command ``export``."""

from pathlib import Path
from typing import Annotated, cast

import typer

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.build_options import BuildConfig, OnnxOnly, SetBuild, build_options
from advmoe_deploy.cli.completion import named_models
from advmoe_deploy.cli.options import (
    NAMED,
    ClassMap,
    Data,
    Json,
    Overwrite,
    Threads,
    use_torch_threads,
)
from advmoe_deploy.cli.session import Session, session
from advmoe_deploy.cli.targets.kserve import Image, Server, StorageUri
from advmoe_deploy.cli.targets.source import Source
from advmoe_deploy.cli.targets.triton import Device, MaxBatch, Mount
from advmoe_deploy.cli.targets.web import Epsilon, Images, Runtime
from advmoe_deploy.cli.targets.write import write_target
from advmoe_deploy.specs import Precision


def export(
    run: Annotated[
        Path,
        typer.Argument(
            readable=False,
            metavar="RUN",
            autocompletion=named_models,
            help=f"What 'advmoe train' wrote; for trt, trt-rtx also a bundle of --onnx-only{NAMED}",
        ),
    ],
    to: Annotated[
        str, typer.Option("--format", help="onnx, openvino, trt, trt-rtx, triton, web or kserve.")
    ] = "onnx",
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
        typer.Option(
            "--out",
            readable=False,
            help="By default RUN/bundle, BUNDLE-FORMAT, or ./NAME-bundle of a name.",
        ),
    ] = None,
    data: Data = None,
    class_map: ClassMap = None,
    overwrite: Overwrite = False,
    threads: Threads = 0,
    as_json: Json = False,
    reference: Annotated[
        bool,
        typer.Option("--reference/--no-reference", help="Ship the weights that verify attacks."),
    ] = True,
    prune_unused: Annotated[
        bool,
        typer.Option("--prune-unused", help="Leave out experts that no image visits; declared."),
    ] = False,
    least_route_agreement: Annotated[
        float | None,
        typer.Option(
            "--least-route-agreement",
            metavar="SHARE",
            min=0,
            max=1,
            help="Share of clear routes that a router keeps in a lower precision, else it stays in "
            "a higher one; by default 0.999. Accuracy limits it either way.",
        ),
    ] = None,
    onnx_only: OnnxOnly = False,
    build_config: BuildConfig = None,
    set_build: SetBuild = None,
    mount: Mount = None,
    device: Device = None,
    max_batch: MaxBatch = None,
    images: Images = None,
    epsilon: Epsilon = None,
    runtime: Runtime = None,
    storage_uri: StorageUri = None,
    image: Image = None,
    server: Server = None,
) -> None:
    """Export a model to a bundle, checked before it is written.

    It answers as the model does, or nothing is written.

    Of a bundle, format triton makes a model repository for NVIDIA's server, web a page that runs it
    in the browser, and kserve the manifests of a service on Kubernetes.
    """
    build = build_options(build_config, set_build or ())
    use_torch_threads(threads)
    with session(as_json, loads=True) as ui:
        others: dict[str, object] = {"--precision": precision, "--no-reference": not reference}
        others |= {"--onnx-only": onnx_only, "--prune-unused": prune_unused}
        others |= {"--build-config": build_config, "--set-build": set_build}
        # Not the number: 0.0 is given, too.
        others |= {"--least-route-agreement": least_route_agreement is not None}
        others |= {"--data": data, "--class-map": class_map}
        own: dict[str, dict[str, object]] = {
            "triton": {"--mount": mount, "--device": device, "--max-batch": max_batch},
            "web": {"--images": images, "--epsilon": epsilon, "--runtime": runtime},
            "kserve": {"--storage-uri": storage_uri, "--image": image, "--server": server},
        }
        if write_target(ui, to, Source(run, out, overwrite), own, others):
            return
        from advmoe_deploy import api
        from advmoe_deploy.data.matching import read_class_map

        bundle = api.export(
            run,
            out,
            format=to,
            precisions=cast("list[Precision]", precision or []),
            data=data,
            class_map=read_class_map(class_map),
            overwrite=overwrite,
            with_reference=reference,
            onnx_only=onnx_only,
            build=build,
            least_route_agreement=least_route_agreement,
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
        "denormal_weights": manifest.denormal_weights,
        "engines": [e.model_dump(mode="json", exclude={"plan", "files"}) for e in manifest.engines],
        "macs": manifest.macs.model_dump(mode="json"),
        "warnings": list(bundle.warnings),
        "bytes": sum(record.bytes for record in manifest.files.values()),
    }
    ui.show(value, lambda: tables.export_report(bundle))

"""Functions of the public Python API that make a model, and open what was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from advmoe_deploy.api.arguments import checked
from advmoe_deploy.bundle import MANIFEST, Bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.runtime.select import open_runner as open_runner_of
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.zoo.resolve import StrPath, opened, place_for, resolve
from advmoe_deploy.zoo.resolve import open_bundle as bundle_of

if TYPE_CHECKING:
    from advmoe_deploy.models.base import Classifier
    from advmoe_deploy.models.checkpoint import Checkpoint
    from advmoe_deploy.runtime.runner import Runner
    from advmoe_deploy.specs import Precision
    from advmoe_deploy.train.run.report import TrainReport


@checked()
def train(
    recipe: str,
    out: StrPath | None = None,
    *,
    data: str | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    devices: int = 1,
    start: StrPath | None = None,
    progress: Progress | None = None,
) -> TrainReport:
    """Train a model adversarially and return what it reaches on the test images.

    Args:
        recipe: a name that ``advmoe list recipes`` shows; with ``data`` also ``advmoe``,
            ``at-moe``, ``dense`` or ``s-dense``, whose settings are then chosen for the images.
        out: the run folder; by default ``runs/RECIPE``, or ``runs/FOLDER-RECIPE``.
        data: a folder of images by class, ``NAME`` or ``NAME:PATH``; by default the recipe's.
        settings: changes to the recipe, such as ``"epochs=3"`` or ``"model.num_experts=4"``.
        resume: continue an interrupted run.
        overwrite: replace an older run.
        devices: processes or GPUs that share each batch.
        start: a run, ``zoo:NAME``, a checkpoint or a bundle, whose network and weights to take.
        progress: receives progress reports.

    Raises:
        UsageError: the recipe, a setting or the data make no sense, or ``out`` is in the way.
        DataError: the data cannot be read.
        DivergedError: a loss or a weight is not finite; the last checkpoint is good.
        MachineError: the disk is full or may not be written; the last checkpoint is good.
    """
    from advmoe_deploy.train.device import require_torch
    from advmoe_deploy.train.request import train_request

    require_torch()
    asked = train_request(
        recipe,
        out,
        data=data,
        settings=settings,
        devices=devices,
        resume=resume,
        overwrite=overwrite,
        start=(str(start), resolve(start)) if start else None,
    )
    from advmoe_deploy.train.run.loop import train_requested  # now: it loads PyTorch

    return train_requested(asked, progress or Silent())


@checked()
def import_checkpoint(
    file: StrPath,
    source: str,
    out: StrPath | None = None,
    *,
    settings: Sequence[str] = (),
    key: str = "",
    classes: StrPath | Sequence[str] | None = None,
    data: str | None = None,
    epsilon: float | None = None,
    overwrite: bool = False,
) -> Checkpoint:
    """Import a checkpoint that a paper's released code wrote, and return what the run now says.

    Nothing in the file is run. The result's ``model`` is the architecture, its ``provenance`` says
    what was unwrapped and what was left out.

    Args:
        file: a file of ``torch.save`` or of safetensors.
        source: whose code wrote it: ``advmoe``, ``robust-experts`` or ``dual-model``.
        out: the run folder; by default ``runs/`` and the file's name.
        settings: what names and shapes cannot tell, such as ``"image_size=64"``.
        key: where the network is in a file of several, such as ``"state_dict_ema"``.
        classes: names in the order of the outputs, or a file of them; by default the data's.
        data: what it was trained on, if known.
        epsilon: the l-inf radius in [0, 1] pixels that it was trained for, if known.
        overwrite: replace an older run.

    Raises:
        CheckpointError: the file is missing, damaged, needs code, or holds another network.
        UsageError: the source, the key or a setting make no sense, or ``out`` is in the way.
    """
    from advmoe_deploy.data.notices import say_once
    from advmoe_deploy.data.remembered import remembered
    from advmoe_deploy.models.upstream.run import run_from_released

    run = Path(out) if out is not None else Path("runs") / Path(file).stem
    describe = remembered(classes, data, epsilon, say_once).of
    return run_from_released(
        Path(file), source, run, settings=settings, key=key, overwrite=overwrite, describe=describe
    )


@checked()
def load_model(run: StrPath) -> Classifier:
    """Return the PyTorch model of a run, in eval mode: images [N, C, H, W] in [0, 1] to logits.

    Args:
        run: a run folder; ``NAME`` or ``zoo:NAME`` of ``advmoe list models``; or
            ``hub:USER/NAME[@REVISION]``. A bundle gives its reference.

    Raises:
        UsageError: no model has that name.
        InputError: the model is missing, damaged or of another version.
        MachineError: the hub cannot be reached.
    """
    from advmoe_deploy.models.stored import open_stored

    return open_stored(resolve(run)).model


@checked()
def export(
    run: StrPath,
    out: StrPath | None = None,
    *,
    format: str = "onnx",  # noqa: A002
    precisions: Sequence[Precision] = (),
    data: str | None = None,
    class_map: Mapping[str, str] | None = None,
    overwrite: bool = False,
    with_reference: bool = True,
    onnx_only: bool = False,
    build: BuildOptions | None = None,
    least_route_agreement: float | None = None,
    prune_unused: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a run to a bundle, checked against the model before it appears.

    A lower precision that is not faster than fp32 on this CPU is said to ``progress``.

    Args:
        run: as for :func:`load_model`; for ``trt`` and ``trt-rtx`` also a bundle of such graphs.
        out: by default ``RUN/bundle``, ``BUNDLE-FORMAT``, or of a name ``./NAME-bundle``.
        format: ``onnx``, ``openvino``, ``trt`` or ``trt-rtx``.
        precisions: ``fp32`` (the default), ``fp16``, ``bf16``, ``int8``; the bundle runs in the
            first, on that format's engine, unless told. Of a bundle by default all that it holds.
        data: images to check on; by default the run's own.
        class_map: the model's name of classes that ``data`` calls otherwise.
        overwrite: replace an older bundle.
        with_reference: also write the weights that :func:`verify` attacks.
        onnx_only: for ``trt``, write graphs and a script that build the engines elsewhere.
        build: for ``trt`` and ``trt-rtx``, how engines are built.
        least_route_agreement: share of the clear routes, by default 0.999, that a router has to
            keep to run in a lower precision; accuracy limits it either way.
        prune_unused: leave out the experts that no image visits.
        progress: receives progress reports.

    Raises:
        UsageError: a name is unknown, options do not go together, or ``out`` is in the way.
        CheckpointError: the run's checkpoint cannot be used.
        DataError: the data cannot be read.
        CheckFailedError: the exported model does not answer what the model answers.
        BackendUnavailableError: what the format needs is not installed.
    """
    from advmoe_deploy.export.request import require_bundle_request, targets_of

    build = build or BuildOptions()
    targets = targets_of(
        format, precisions, build, onnx_only=onnx_only, least_route_agreement=least_route_agreement
    )
    source = resolve(run)
    if (source / MANIFEST).is_file():
        from advmoe_deploy.export.tensorrt.from_bundle import build_from_bundle

        options = {"--data": data, "--class-map": class_map, "--no-reference": not with_reference}
        options |= {"--onnx-only": onnx_only, "--prune-unused": prune_unused}
        options |= {"--least-route-agreement": least_route_agreement is not None}
        require_bundle_request(format, options)
        beside = source.resolve().with_name(f"{source.resolve().name}-{format}")
        return build_from_bundle(
            bundle_of(source),
            Path(out) if out is not None else place_for(run, source, format, beside),
            build=build,
            precisions=precisions,
            overwrite=overwrite,
            library="tensorrt-rtx" if format == "trt-rtx" else "tensorrt",
            progress=progress,
        )
    if least_route_agreement is not None and all(target.is_exact for target in targets):
        raise UsageError("--least-route-agreement goes with a --precision below fp32")
    from advmoe_deploy.export.from_run import export_run
    from advmoe_deploy.profiling.lowered import slower_than_fp32
    from advmoe_deploy.progress import Silent

    bundle = export_run(
        source,
        Path(out) if out is not None else place_for(run, source, "bundle", source / "bundle"),
        data=data,
        class_map=class_map,
        overwrite=overwrite,
        with_reference=with_reference,
        targets=[t for t in targets if (t.backend, t.precision) != ("onnxruntime", "fp32")],
        made_for=targets[0],
        prune_unused=prune_unused,
        progress=progress,
    )
    for line in slower_than_fp32(bundle):
        (progress or Silent()).note(line)
    return bundle


@checked()
def open_bundle(path: StrPath, *, signed_by: StrPath | None = None) -> Bundle:
    """Return a bundle after checking the hash of every file.

    Args:
        path: the bundle; ``NAME`` or ``zoo:NAME`` of ``advmoe list models``; or
            ``hub:USER/NAME[@REVISION]``.
        signed_by: the public key, in PEM, of whoever must have signed it; by default nobody.

    Raises:
        InputError: something is missing, changed, not listed, not signed or of another version.
        UsageError: no bundle has that name.
        MachineError: the hub cannot be reached.
        BackendUnavailableError: the client of the hub, or what checks signatures, is missing.
    """
    return bundle_of(path, signed_by=signed_by)


@checked()
def open_runner(bundle: Bundle | StrPath, engine: str | None = None, *, threads: int = 0) -> Runner:
    """Return a runner, whose ``infer(images)`` gives logits and routes; a context manager.

    Args:
        bundle: a bundle, or its path.
        engine: a name that ``advmoe list engines`` shows, or ``NAME:PRECISION``; by default what
            the bundle was exported for.
        threads: of the engine; 0 lets it choose.

    Raises:
        UsageError: no engine or precision has that name.
        BundleError: the bundle is damaged, or was not exported for that engine.
        BackendUnavailableError: the engine's package is not installed.
    """
    return open_runner_of(opened(bundle), engine, threads=threads)

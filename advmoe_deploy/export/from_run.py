"""Export of a run to a bundle: cut, lower, fold, stitch, check, seal.

The bundle is written under a temporary name and renamed when every check has passed, so that a
failure, a full disk or Ctrl-C leaves nothing.
"""

import platform
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import PIL
import torch

from advmoe_deploy.bundle import CARD, GOLDEN, MANIFEST, REFERENCE, Bundle, EngineSet
from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.errors import CheckpointError, UsageError
from advmoe_deploy.export.checks.every_expert import unvisited_experts
from advmoe_deploy.export.checks.images import absolute_source, labelled_images, parity_images
from advmoe_deploy.export.engine_sets import write_engine_set
from advmoe_deploy.export.graph_files import check_graphs, write_baselines, write_graphs
from advmoe_deploy.export.model_card import denormals_note, model_card
from advmoe_deploy.export.partition.cut import Partition
from advmoe_deploy.export.precision.gate import AnsweredImages
from advmoe_deploy.export.prune import without_unused
from advmoe_deploy.export.subject import subject_of
from advmoe_deploy.export.targets import PORTABLE, Target, require_supported
from advmoe_deploy.files import refuse_existing, sha256_of, staged_directory
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import WEIGHTS, Checkpoint, load_checkpoint
from advmoe_deploy.models.denormals import zero_denormals
from advmoe_deploy.models.macs import macs_of
from advmoe_deploy.parity.answers import Answers, Images
from advmoe_deploy.parity.compare import batches_in
from advmoe_deploy.parity.golden import write_golden
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.reports.devices import GpuLibrary
from advmoe_deploy.runtime.onnxruntime.engine import onnxruntime_version
from advmoe_deploy.runtime.openvino.engine import openvino_version
from advmoe_deploy.runtime.tensorrt.api import version_text
from advmoe_deploy.sealing.seal import seal_bundle

_TORCH = "answers of torch"


def export_run(
    run: Path,
    out: Path,
    *,
    data: str | None = None,
    class_map: Mapping[str, str] | None = None,
    overwrite: bool = False,
    with_reference: bool = True,
    targets: Sequence[Target] = (),
    made_for: Target | None = None,
    prune_unused: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Return the bundle written to ``out`` from the model in ``run``.

    Args:
        run: a run directory; its ``model`` holds the checkpoint.
        out: the bundle to be.
        data: images to check on: a data source, or ``random:N``; by default the run's own data.
        class_map: the model's name of classes that ``data`` calls otherwise.
        overwrite: replace an ``out`` that is a bundle already.
        with_reference: also write the torch weights, which ``verify`` attacks.
        targets: engines and precisions to write graphs for, beside the portable one in fp32.
        made_for: what the bundle runs on unless told; by default the first target.
        prune_unused: leave out the experts that no image visits, see
            :mod:`~advmoe_deploy.export.prune`.
        progress: who listens.

    Raises:
        UsageError: ``out`` is in the way, or ``data`` does not fit the model or the pruning.
        CheckpointError: the run's checkpoint cannot be used.
        DataError: the data cannot be loaded.
        CheckFailedError: the exported model does not answer what the torch model answers.
        BackendUnavailableError: ONNX Runtime or what ``targets`` need is missing.
    """
    progress = progress or Silent()
    made_for = made_for or next(iter(targets), PORTABLE)
    refuse_existing(out, overwrite=overwrite, marker=MANIFEST)
    for target in targets:
        require_supported(target)
    if class_map and not prune_unused and all(target.is_exact for target in targets):
        raise UsageError(
            "--class-map renames classes where accuracy is measured, and an export of fp32 "
            "measures none; leave it out, or give --precision int8 or --prune-unused"
        )
    versions = _versions(targets)
    checkpoint, model = load_checkpoint(run / "model")
    denormals = zero_denormals(model)
    if denormals:
        progress.note(denormals_note(denormals))
    source = absolute_source(data or checkpoint.data, checkpoint.model.image_size)
    images = parity_images(source, checkpoint.model, checkpoint.decoding)
    pruning = None
    if prune_unused:
        labelled = _labelled(source, checkpoint, progress, class_map)
        threat = checkpoint.threat
        model, pruning = without_unused(
            model, images, data=source, labelled=labelled, threat=threat, progress=progress
        )
        checkpoint = checkpoint.model_copy(update={"model": model.spec})
    with (
        staged_directory(out, overwrite=overwrite) as staged,
        task(progress, "export", 4 + len(targets)),
    ):
        answers = _torch_answers(model, images, progress)
        progress.advance("export")
        parts, reports = write_graphs(staged, model, images, progress)
        write_golden(staged / GOLDEN, images, answers)
        if with_reference:
            _copy_reference(run / "model" / WEIGHTS, staged, checkpoint)
        progress.advance("export")
        write_baselines(staged, model, progress)
        progress.advance("export")
        parity = check_graphs(staged, model, parts, images, answers, data=source, progress=progress)
        for layer, experts in unvisited_experts(parts.plan, answers).items():
            progress.note(
                f"{layer}: {_named(experts)} visited by none of the {len(images)} images of "
                f"{source}, and checked on images sent there by force"
            )
        engines = _write_engines(
            staged,
            targets,
            checkpoint,
            model,
            parts,
            AnsweredImages(images, answers),
            source,
            progress,
            class_map,
        )
        macs = macs_of(checkpoint.model)
        card = model_card(checkpoint, macs, parity, reports, engines, pruning, denormals)
        (staged / CARD).write_text(card, encoding="utf-8")
        manifest = seal_bundle(
            staged,
            model=checkpoint.model,
            decoding=checkpoint.decoding,
            threat=checkpoint.threat,
            precision=made_for.precision,
            made_for=made_for.runs_on,
            plan=parts.plan,
            engines=engines,
            macs=macs,
            parity=parity,
            pruning=pruning,
            denormal_weights=denormals,
            class_names=checkpoint.class_names,
            training=_training(checkpoint),
            versions=versions,
        )
        progress.advance("export")
    return Bundle(out, manifest)


def _torch_answers(model: Classifier, images: Images, progress: Progress) -> Answers:
    with task(progress, _TORCH, batches_in(images)):
        return reference_answers(model, images, passed=partial(progress.advance, _TORCH))


def _named(experts: list[int]) -> str:
    numbers = ", ".join(map(str, experts))
    return f"expert {numbers} is" if len(experts) == 1 else f"experts {numbers} are"


def _copy_reference(weights: Path, staged: Path, checkpoint: Checkpoint) -> None:
    shutil.copyfile(weights, staged / REFERENCE)
    if sha256_of(staged / REFERENCE) != checkpoint.weights_sha256:
        raise CheckpointError(f"{weights} changed during the export; export again")


def _write_engines(
    staged: Path,
    targets: Sequence[Target],
    checkpoint: Checkpoint,
    model: Classifier,
    parts: Partition,
    examples: AnsweredImages,
    data: str,
    progress: Progress,
    class_map: Mapping[str, str] | None,
) -> tuple[EngineSet, ...]:
    """Write the graphs of every target; examined on labelled images where precision is lowered."""
    if not targets:
        return ()
    labelled = None
    if any(not target.is_exact for target in targets):
        labelled = _labelled(data, checkpoint, progress, class_map)
        if labelled is None:
            progress.note("no labelled images: accuracy is not measured, predictions are compared")
    subject = subject_of(
        model,
        parts,
        examples,
        data=data,
        labelled=labelled,
        threat=checkpoint.threat,
        progress=progress,
    )
    engines = []
    for target in targets:
        engines.append(write_engine_set(staged, target, subject))
        progress.advance("export")
    return tuple(engines)


def _labelled(
    data: str, checkpoint: Checkpoint, progress: Progress, class_map: Mapping[str, str] | None
) -> Dataset | None:
    return labelled_images((data, checkpoint.data), checkpoint, progress.note, class_map)


def _training(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        **checkpoint.provenance,
        "recipe": checkpoint.recipe,
        "metrics": checkpoint.metrics,
        "weights_sha256": checkpoint.weights_sha256,
    }


def _versions(targets: Sequence[Target]) -> Mapping[str, str]:
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime_version(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
    }
    if any(target.backend == "openvino" for target in targets):
        versions["openvino"] = openvino_version()
    for library in get_args(GpuLibrary):
        if any(target.backend == library and not target.onnx_only for target in targets):
            versions[library] = version_text(library)
    return versions

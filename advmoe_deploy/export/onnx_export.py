"""From a run to a bundle: cut, lower, fold, stitch, check, seal.

The bundle is written under a temporary name and renamed when every check has passed, so that a
failure, a full disk or Ctrl-C leaves nothing.
"""

import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto

from advmoe_deploy.bundle import GOLDEN, MANIFEST, MODEL, REFERENCE, Bundle, seal_bundle
from advmoe_deploy.errors import CheckpointError
from advmoe_deploy.export.images import golden_rows, parity_images
from advmoe_deploy.export.lowering import onnx_from_module
from advmoe_deploy.export.model_card import model_card
from advmoe_deploy.export.onnx_graph import write_model
from advmoe_deploy.export.parity import compare_answers, require_parity, require_segments
from advmoe_deploy.export.partition import Partition, partition
from advmoe_deploy.export.passes.fold_batchnorm import fold_batchnorm
from advmoe_deploy.export.passes.report import PassReport, apply_checked
from advmoe_deploy.export.passes.strided_shortcut import strided_shortcut
from advmoe_deploy.export.reference import Answers, Images, reference_answers
from advmoe_deploy.export.stitch import graph_from_plan
from advmoe_deploy.export.structure import require_every_expert
from advmoe_deploy.export.unfused import unfused_graph
from advmoe_deploy.export.unvisited import require_branch, unvisited_experts
from advmoe_deploy.files import refuse_existing, sha256_of, staged_directory
from advmoe_deploy.models.checkpoint import WEIGHTS, Checkpoint, load_checkpoint
from advmoe_deploy.models.advmoe import AdvMoE
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.macs import macs_of
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.plan import Plan
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.reports import ParityReport
from advmoe_deploy.runtime.ort_engine import onnxruntime_version
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.runtime.prediction import Prediction
from advmoe_deploy.runtime.runner import GraphRunner, Runner

PASSES = (fold_batchnorm, strided_shortcut)
UNFUSED = "baselines/unfused.onnx"

Reports = dict[str, tuple[PassReport, ...]]
_BATCH = 128


def export_onnx(
    run: Path,
    out: Path,
    *,
    data: str | None = None,
    overwrite: bool = False,
    with_reference: bool = True,
    progress: Progress | None = None,
) -> Bundle:
    """Return the bundle written to ``out`` from the model in ``run``.

    Args:
        run: a run directory; its ``model`` holds the checkpoint.
        out: the bundle to be.
        data: images to check on: a data source, or ``random:N``; by default the run's own data.
        overwrite: replace an ``out`` that is a bundle already.
        with_reference: also write the torch weights, which ``verify`` attacks.
        progress: who listens.

    Raises:
        UsageError: ``out`` is in the way, or ``data`` does not fit the model.
        CheckpointError: the run's checkpoint cannot be used.
        DataError: the data cannot be loaded.
        CheckFailedError: the exported model does not answer what the torch model answers.
        BackendUnavailableError: ONNX Runtime is not installed.
    """
    progress = progress or Silent()
    refuse_existing(out, overwrite=overwrite, marker=MANIFEST)
    versions = _versions()
    checkpoint, model = load_checkpoint(run / "model")
    source = data or str(checkpoint.provenance.get("data", ""))
    images = parity_images(source, checkpoint.model)
    with staged_directory(out, overwrite=overwrite) as staged, task(progress, "export", 4):
        answers = reference_answers(model, images)
        progress.advance("export")
        plan, reports = _write_graphs(staged, model, images, progress)
        _write_golden(staged, images, answers)
        if with_reference:
            _copy_reference(run / "model" / WEIGHTS, staged, checkpoint)
        progress.advance("export")
        _write_baselines(staged, model)
        progress.advance("export")
        parity = check_graphs(staged, model, plan, images, answers, data=source)
        for expert in unvisited_experts(answers):
            progress.note(
                f"expert {expert} is visited by none of the {len(images)} images of {source}; it "
                "was checked on images sent there by force"
            )
        macs = macs_of(checkpoint.model)
        card = model_card(checkpoint, macs, parity, reports)
        (staged / "MODEL_CARD.md").write_text(card, encoding="utf-8")
        manifest = seal_bundle(
            staged,
            model=checkpoint.model,
            threat=checkpoint.threat,
            precision="fp32",
            plan=plan,
            macs=macs,
            parity=parity,
            class_names=checkpoint.class_names,
            training=_training(checkpoint),
            versions=versions,
        )
        progress.advance("export")
    return Bundle(out, manifest)


def check_graphs(
    staged: Path, model: Classifier, plan: Plan, images: Images, answers: Answers, *, data: str
) -> ParityReport:
    """Return how the graphs under ``staged`` compare with ``model``, which answers ``answers``.

    Read from the files, as a user will: the whole graph, the unfused one and the plan on every
    image, each pathway on forced routes, and every expert's weights in the graph.

    Raises:
        CheckFailedError: a logit, a route or an expert is not what it should be.
    """
    files = {segment.name: staged / segment.file for segment in plan.segments}
    segments = {name: onnx.load_model(file) for name, file in files.items()}
    graph = onnx.load_model(staged / MODEL)
    require_every_expert(plan, graph, segments)
    few = images[golden_rows(answers)]
    if isinstance(model, AdvMoE):
        require_segments(model, plan, files, few)
        for expert in unvisited_experts(answers):
            require_branch(model, plan, graph, few, expert)
    shape, routes = model.spec.image_shape, plan.routes

    def checked(runner: Runner, name: str) -> ParityReport:
        with runner:
            report = compare_answers(answers, _predictions(runner, images), data=data)
        require_parity(report, name)
        return report

    checked(PlanRunner(plan, files, shape), "the plan")
    if isinstance(model, AdvMoE):
        checked(GraphRunner(staged / UNFUSED, shape, routes=routes), UNFUSED)
    return checked(GraphRunner(staged / MODEL, shape, routes=routes), MODEL)


def _copy_reference(weights: Path, staged: Path, checkpoint: Checkpoint) -> None:
    shutil.copyfile(weights, staged / REFERENCE)
    if sha256_of(staged / REFERENCE) != checkpoint.weights_sha256:
        raise CheckpointError(f"{weights} changed during the export; export again")


def _predictions(runner: Runner, images: Images) -> list[Prediction]:
    return [runner.infer(batch) for batch in np.split(images, range(_BATCH, len(images), _BATCH))]


def _write_graphs(
    staged: Path, model: Classifier, images: Images, progress: Progress
) -> tuple[Plan, Reports]:
    """Write every segment and the whole graph; return the plan and what the passes did."""
    parts = partition(model)
    segments, reports = segment_graphs(parts, images[:8])
    for segment in parts.plan.segments:
        write_model(segments[segment.name], staged / segment.file)
    write_model(graph_from_plan(parts.plan, segments), staged / MODEL)
    if isinstance(model, AdvMoE):
        unfused = unfused_graph(parts.plan, segments)
        write_model(unfused, staged / UNFUSED)
    for name, done in reports.items():
        for reason in (reason for report in done for reason in report.declined):
            progress.note(f"{name}: {reason}")
    return parts.plan, reports


def segment_graphs(parts: Partition, images: Images) -> tuple[dict[str, ModelProto], Reports]:
    """Return the graph of each segment after all passes, each checked on ``images``."""
    graphs: dict[str, ModelProto] = {}
    reports: Reports = {}
    for segment in parts.plan.segments:
        (image,), (output,) = segment.inputs, segment.outputs
        graph = onnx_from_module(parts.modules[segment.name], segment.name, image, output)
        reports[segment.name] = apply_checked(PASSES, graph, images)
        graphs[segment.name] = graph
    return graphs, reports


def _write_baselines(staged: Path, model: Classifier) -> None:
    """Write the dense networks an AdvMoE is timed against: random weights, the real shapes."""
    if not isinstance(model, AdvMoE):
        return
    images = parity_images("random:64", model.spec)  # the same baselines whatever the data
    for name, spec in (("dense", model.spec.dense()), ("s-dense", model.spec.s_dense())):
        parts = partition(untrained_model(spec, torch.from_numpy(images)))
        segments, _ = segment_graphs(parts, images[:8])
        graph = graph_from_plan(parts.plan, segments)
        write_model(graph, staged / "baselines" / f"{name}.onnx")


def _write_golden(staged: Path, images: Images, answers: Answers) -> None:
    rows = golden_rows(answers)
    arrays: dict[str, np.ndarray] = {"images": images[rows], "logits": answers.logits[rows]}
    if answers.scores is not None and answers.expert_ids is not None:
        arrays |= {"scores": answers.scores[rows], "expert_ids": answers.expert_ids[rows]}
    np.savez(staged / GOLDEN, **arrays)  # type: ignore[arg-type]


def _training(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        **checkpoint.provenance,
        "recipe": checkpoint.recipe,
        "metrics": checkpoint.metrics,
        "weights_sha256": checkpoint.weights_sha256,
    }


def _versions() -> Mapping[str, str]:
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime_version(),
        "torch": torch.__version__,
    }

"""Graphs of a bundle: written, and compared with the torch model as they lie there."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import torch

from advmoe_deploy.bundle import MODEL
from advmoe_deploy.export.checks.every_expert import (
    require_branches,
    require_every_expert,
    require_segments,
)
from advmoe_deploy.export.checks.images import parity_images
from advmoe_deploy.export.graph.stitch import graph_from_plan
from advmoe_deploy.export.graph.unfused import unfused_graph
from advmoe_deploy.export.graph.writer import write_model
from advmoe_deploy.export.partition.cut import Partition, partition
from advmoe_deploy.export.passes.apply import SAMPLES, Reports, apply_passes
from advmoe_deploy.export.passes.fuse_router import fuse_router_checked
from advmoe_deploy.export.passes.report import declined
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.parity.answers import Answers, Images
from advmoe_deploy.parity.batches import batch_complaint, require_any_batch, steady_images
from advmoe_deploy.parity.compare import (
    batches_in,
    compare_answers,
    predictions_of,
    require_parity,
)
from advmoe_deploy.parity.golden import golden_rows
from advmoe_deploy.parity.reference import Reference, Uncertainty
from advmoe_deploy.parity.tolerance import tolerance_for
from advmoe_deploy.plan import Plan
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.reports import ParityReport
from advmoe_deploy.runtime.onnxruntime.graph_runner import GraphRunner
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.specs import ModelSpec

UNFUSED = "baselines/unfused.onnx"
_WRITE, _BASELINES, _COMPARE = "write graphs", "baselines", "compare with torch"


def write_graphs(
    staged: Path, model: Classifier, images: Images, progress: Progress
) -> tuple[Partition, Reports]:
    """Write every segment and the whole graphs; return the plan and what the passes did."""
    parts, reports = apply_passes(partition(model, progress), images, model.rules, progress)
    plan, graphs = parts.plan, parts.graphs
    with task(progress, _WRITE, 3):
        for segment in plan.segments:
            write_model(graphs[segment.name], staged / segment.file)
        progress.advance(_WRITE)
        whole = graph_from_plan(plan, graphs)
        if plan.routes:
            reports[MODEL] = (fuse_router_checked(whole, {"images": images[:SAMPLES]}),)
        write_model(whole, staged / MODEL)
        progress.advance(_WRITE)
        if plan.routes:
            write_model(unfused_graph(plan, graphs), staged / UNFUSED)
        progress.advance(_WRITE)
    for reason, count in declined(reports).items():
        progress.note(f"{reason} ({count} times)" if count > 1 else reason)
    return parts, reports


def write_baselines(staged: Path, model: Classifier, progress: Progress) -> None:
    """Write the dense networks an MoE is timed against: random weights, the real shapes."""
    if not model.rules:
        return
    specs = {"dense": model.spec.dense(), "s-dense": model.spec.s_dense()}
    if specs["s-dense"] == specs["dense"]:  # experts of full width have no smaller counterpart
        del specs["s-dense"]
    with task(progress, _BASELINES, len(specs)):
        for name, spec in specs.items():
            write_model(_baseline(spec, progress), staged / "baselines" / f"{name}.onnx")
            progress.advance(_BASELINES)


def _baseline(spec: ModelSpec, progress: Progress) -> onnx.ModelProto:
    images = parity_images("random:64", spec)  # the same baselines whatever the data
    network = untrained_model(spec, torch.from_numpy(images))
    parts, _ = apply_passes(partition(network, progress), images, progress=progress)
    return graph_from_plan(parts.plan, parts.graphs)


def check_graphs(
    staged: Path,
    model: Classifier,
    parts: Partition,
    images: Images,
    answers: Answers,
    *,
    data: str,
    progress: Progress | None = None,
) -> ParityReport:
    """Return how the graphs under ``staged`` compare with ``model``, which answers ``answers``.

    Read from the files, as a user will: the whole graph, the unfused one and the plan on every
    image, a few in batches of other sizes; and every expert of every layer, visited or not.

    Raises:
        CheckFailedError: a logit, a route or an expert is not what it should be.
    """
    progress = progress or Silent()
    openers = _openers(staged, parts.plan, model.spec.image_shape)
    with task(progress, _COMPARE, 3 + len(openers)):
        few = images[golden_rows(answers)]
        uncertain = _check_experts(staged, model, parts, few, progress)
        steady = steady_images(images, answers, margin=uncertain.margin)
        for name, opener in openers.items():
            with opener() as runner, task(progress, name, batches_in(images)):
                answer = predictions_of(runner, images, partial(progress.advance, name))
                moved = batch_complaint(runner, steady, tolerance_for(uncertain.rounding))
            report = compare_answers(
                answers, answer, rounding=uncertain.rounding, margin=uncertain.margin, data=data
            )
            require_parity(report, name)
            require_any_batch(moved, name)
            progress.advance(_COMPARE)
    return report


def _check_experts(
    staged: Path, model: Classifier, parts: Partition, few: Images, progress: Progress
) -> Uncertainty:
    """Check every expert on a ``few`` images; return how certain the model's own answers are."""
    plan = parts.plan
    files = {segment.name: staged / segment.file for segment in plan.segments}
    segments = {name: onnx.load_model(file) for name, file in files.items()}
    graph = onnx.load_model(staged / MODEL)
    require_every_expert(plan, graph, segments)
    require_segments(files, parts.samples(few[:SAMPLES]))
    progress.advance(_COMPARE)
    reference = Reference(model)
    require_branches(reference, plan, graph, few[:SAMPLES])
    progress.advance(_COMPARE)
    uncertain = reference.uncertainty(few)
    progress.advance(_COMPARE)
    return uncertain


def _openers(
    staged: Path, plan: Plan, shape: tuple[int, int, int]
) -> dict[str, Callable[[], Runner]]:
    """Return by name what opens each form that the model lies there in, the shipped one last."""
    files = {segment.name: staged / segment.file for segment in plan.segments}
    graph = partial(GraphRunner, image_shape=shape, routes=plan.routes)
    openers: dict[str, Callable[[], Runner]] = {"the plan": partial(PlanRunner, plan, files, shape)}
    if plan.routes:
        openers[UNFUSED] = partial(graph, staged / UNFUSED)
        bodies = partial(graph, staged / MODEL, custom_ops="bodies")
        openers[f"{MODEL} without our kernels"] = bodies
    return {**openers, MODEL: partial(graph, staged / MODEL)}

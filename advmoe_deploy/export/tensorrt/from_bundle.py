"""Build of a bundle's TensorRT graphs: on the machine that is to run them or, for RTX, anywhere.

Needs no PyTorch. The bundle is copied and sealed anew with the engines, under a temporary name that
becomes the new one when every check has passed. Checked is what travels with a bundle: the golden
images with what the torch model answers to them, and every expert against its own graph, which ONNX
Runtime runs. The graphs were examined under attack when they were exported.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from advmoe_deploy.bundle import (
    CARD,
    GOLDEN,
    MANIFEST,
    Bundle,
    BundleManifest,
    EngineSet,
)
from advmoe_deploy.errors import BundleError
from advmoe_deploy.export.model_card import card_with_engines
from advmoe_deploy.export.partition.sample import Arrays
from advmoe_deploy.export.precision.casts import for_cpu
from advmoe_deploy.export.precision.gate import (
    AccuracyGate,
    AnsweredImages,
    Findings,
    GateLimits,
    precision_report,
)
from advmoe_deploy.export.precision.recording import Recording
from advmoe_deploy.export.targets import require_gpu
from advmoe_deploy.export.tensorrt.builders import (
    ENGINE_SUFFIX,
    EngineBuilder,
    check_experts,
    check_set,
    engine_folder,
    write_engines,
)
from advmoe_deploy.export.tensorrt.graphs import plan_in
from advmoe_deploy.export.tensorrt.row_graphs import row_graphs
from advmoe_deploy.export.tensorrt.rtx import engine_builder
from advmoe_deploy.files import refuse_existing, staged_directory
from advmoe_deploy.parity.answers import Images
from advmoe_deploy.parity.golden import read_golden
from advmoe_deploy.plan import ExpertsStep, Plan
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.reports import PrecisionReport
from advmoe_deploy.reports.devices import Device, GpuLibrary
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine, onnxruntime_version
from advmoe_deploy.runtime.tensorrt.build import BuildOptions, require_buildable
from advmoe_deploy.runtime.tensorrt.shapes import Shapes, shapes_of_segments
from advmoe_deploy.sealing.seal import seal_again
from advmoe_deploy.specs import Precision

# Images that every expert is checked on.
_FEW = 16


def build_from_bundle(
    source: Bundle,
    out: Path,
    *,
    build: BuildOptions,
    precisions: Sequence[Precision] = (),
    overwrite: bool = False,
    library: GpuLibrary = "tensorrt",
    builder: EngineBuilder | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Return the bundle written to ``out``: ``source``, and engines of its graphs.

    Engines of the same precisions that ``source`` has already are left out.

    Args:
        source: an opened, so verified, bundle.
        out: the bundle to be.
        build: how to build.
        precisions: of the engines; by default all that there are graphs of.
        overwrite: replace an ``out`` that is a bundle already, be it ``source``.
        library: TensorRT, whose engines are for this GPU, or RTX, which compiles without one.
        builder: by default the library's.
        progress: who listens.

    Raises:
        UsageError: ``out`` is in the way.
        BundleError: ``source`` holds no such graphs, or TensorRT cannot read one.
        BackendUnavailableError: the library, a GPU that it needs or ONNX Runtime is missing.
        CheckFailedError: an engine does not answer well enough.
        MachineError: memory is used up.
    """
    progress = progress or Silent()
    refuse_existing(out, overwrite=overwrite, marker=MANIFEST)
    wanted = graph_sets(source, precisions)
    builder = builder or _builder(library, build, wanted)
    onnxruntime_version()  # found missing now rather than after the first set was built
    left_out = [e for e in source.manifest.engines if _is_replaced(e, wanted, builder)]
    engines = [each for each in source.manifest.engines if each not in left_out]
    with (
        staged_directory(out, overwrite=overwrite) as staged,
        task(progress, "build", len(wanted)),
    ):
        _copy(source, staged, left_out)
        for each in wanted:
            engines.append(_Building(source, each, builder, build).written_to(staged))
            progress.advance("build")
        manifest = _sealed(staged, source, tuple(engines), builder.device)
    return Bundle(out, manifest)


def graph_sets(bundle: Bundle, precisions: Sequence[Precision] = ()) -> list[EngineSet]:
    """Return the sets of graphs that ``bundle`` holds for TensorRT, by default all.

    Raises:
        BundleError: it has none, or none of one of ``precisions``.
    """
    sets = {e.precision: e for e in bundle.manifest.engines if not e.is_built}
    for precision in precisions or list(sets) or [bundle.manifest.precision]:
        if precision not in sets:
            raise BundleError(
                f"{bundle.path} holds no TensorRT graphs in {precision}; write them with advmoe "
                f"export RUN --format trt --precision {precision} --onnx-only"
            )
    return [sets[precision] for precision in dict.fromkeys(precisions or sets)]


def _builder(
    library: GpuLibrary, build: BuildOptions, wanted: Sequence[EngineSet]
) -> EngineBuilder:
    for each in wanted:
        if library == "tensorrt":
            require_gpu(each.precision, build)
        else:
            require_buildable(each.precision, build, library)
    return engine_builder(library, build)


def _is_replaced(engines: EngineSet, wanted: Sequence[EngineSet], builder: EngineBuilder) -> bool:
    is_engine = engines.backend == builder.device.library and engines.is_built
    return is_engine and engines.precision in {each.precision for each in wanted}


class _Building:
    """The engines of one set of graphs."""

    def __init__(
        self, source: Bundle, graphs: EngineSet, builder: EngineBuilder, build: BuildOptions
    ) -> None:
        self.set, self.builder, self.batch = graphs, builder, build.batch
        self.folder = engine_folder(graphs.precision, builder.device)
        self.plan = plan_in(graphs.plan, self.folder, ENGINE_SUFFIX)
        self.graphs = {
            s.name: onnx.load_model_from_string(source.graph(s.file).read())
            for s in graphs.plan.segments
        }
        layers = [route.layer for route in self.plan.routes]
        examples = AnsweredImages(*read_golden(source, layers))
        parity = source.manifest.parity
        limits = GateLimits(sample=True)
        if check := graphs.check:
            changed = max(limits.predictions, 1 - check.prediction_agreement)
            limits = GateLimits(check.least_route_agreement, changed, sample=True)
        self.gate = AccuracyGate(examples, GOLDEN, parity.rounding, parity.margin, limits=limits)

    def written_to(self, staged: Path) -> EngineSet:
        """Build every engine, write it, and check it as it lies there."""
        moving = {row_graph.name: row_graph for row_graph in row_graphs(self.plan)}
        graphs = {**self.graphs, **{name: row_graph.graph for name, row_graph in moving.items()}}
        shapes = {
            **shapes_of_segments(self.plan, self.batch),
            **{name: row_graph.shapes(self.batch) for name, row_graph in moving.items()},
        }
        write_engines(staged / self.folder, graphs, shapes, self.builder)
        expected = answers_of_experts(self.plan, self.graphs, self.gate.parity.images, shapes)
        tf32 = self.builder.device.tf32
        check_experts(staged, self.plan, expected, self.builder, self.set.segments, tf32=tf32)
        findings = check_set(
            staged, self.plan, self.gate, self.builder, self.set.precision, tf32=tf32
        )
        device = self.builder.device
        changed: dict[str, object] = {"plan": self.plan, "parity": findings.parity}
        changed |= {"device": device, "backend": device.library}
        return self.set.model_copy(update={**changed, "check": self._report(findings)})

    def _report(self, findings: Findings) -> PrecisionReport | None:
        if self.set.precision == "fp32" and not self.builder.device.tf32:
            return None
        raised = self.set.check.raised if self.set.check else {}
        return precision_report(self.gate, raised, findings)


def answers_of_experts(
    plan: Plan,
    graphs: Mapping[str, ModelProto],
    images: Images,
    shapes: Mapping[str, Mapping[str, Shapes]],
) -> dict[str, tuple[Arrays, Arrays]]:
    """Return by expert rows of its layer, sent there or not, and what its graph answers.

    The rows are those of a few ``images``, and no more than ``shapes`` has room for.
    """
    runnable = {name: for_cpu(graph).SerializeToString() for name, graph in graphs.items()}
    few, (channels, height, width) = images[:_FEW], images.shape[1:]
    expected = {}
    with Recording(plan, runnable, (channels, height, width)) as recording:
        for step in [step for step in plan.steps if isinstance(step, ExpertsStep)]:
            given = [b for rows in recording.rows_of(step.segments, few).values() for b in rows]
            rows = np.concatenate([values for batch in given for values in batch.values()])
            for name in step.segments:
                (tensor,) = plan.segment(name).inputs
                inputs = {tensor.name: rows[: shapes[name][tensor.name].max[0]]}
                with OrtEngine(runnable[name]) as engine:
                    expected[name] = inputs, engine.run(inputs)
    return expected


def _copy(source: Bundle, staged: Path, left_out: Sequence[EngineSet]) -> None:
    """Copy what was hashed of ``source``, but for ``left_out`` and the card."""
    folders = tuple(f"{Path(e.plan.segments[0].file).parent.as_posix()}/" for e in left_out)
    for name in source.manifest.files:
        if name == CARD or name.startswith(folders):
            continue
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_bytes(source.read(name))
        shutil.copymode(source.path / name, staged / name)  # a script can be run


def _sealed(
    staged: Path, source: Bundle, engines: tuple[EngineSet, ...], device: Device
) -> BundleManifest:
    """Write the card anew, with ``engines``, and seal everything."""
    card = source.read(CARD).decode()
    (staged / CARD).write_text(card_with_engines(card, engines), encoding="utf-8")
    versions = {**source.manifest.versions, device.library: device.version}
    built = [e.precision for e in engines if e.is_built and e.backend == device.library]
    own = source.manifest.precision
    return seal_again(
        staged,
        source.manifest,
        engines=engines,
        versions=versions,
        made_for=device.library,
        precision=own if own in built else built[0],
    )

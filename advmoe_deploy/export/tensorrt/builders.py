"""Builders of engines from TensorRT's graphs, with their checks; needs no PyTorch.

The checks take the engines as they lie there and run them as they will be run, those that move rows
included.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from onnx import ModelProto

from advmoe_deploy.bundle import FORMATS
from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.partition.sample import Arrays
from advmoe_deploy.export.precision.casts import for_cpu, precision_of
from advmoe_deploy.export.precision.gate import AccuracyGate, Findings, attack_itself, run_gate
from advmoe_deploy.export.precision.search import Precisions
from advmoe_deploy.parity.batches import require_any_batch
from advmoe_deploy.parity.compare import require_parity
from advmoe_deploy.plan import ExpertsStep, Plan
from advmoe_deploy.reports.devices import Device, GpuLibrary
from advmoe_deploy.runtime.engine import Engine, Source, content_of
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.tensorrt.build import BuildOptions, build_engine, timing_cache_file
from advmoe_deploy.runtime.tensorrt.device import this_device
from advmoe_deploy.runtime.tensorrt.engine import TensorRtEngine
from advmoe_deploy.runtime.tensorrt.load import graph_files, runner_of_engines
from advmoe_deploy.runtime.tensorrt.runner import DeviceRunner
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile, Shapes
from advmoe_deploy.specs import Precision

ENGINE_SUFFIX = ".engine"

# Of the norm of an expert's answer; more, and it is broken rather than rounded.
_RESEMBLANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.3, "int8": 0.5}
_RESEMBLANCE_TF32 = 0.02


class Maker(Protocol):
    """Makes what runs instead of TensorRT's graphs, and runs it."""

    # What logits in fp32 may differ by, if the torch model's own rounding is not more.
    tolerance: float

    def build(self, name: str, graph: bytes, shapes: Mapping[str, Shapes]) -> bytes:
        """Return what runs instead of a graph with inputs of these shapes."""

    def open(self, engine: Source) -> Engine:
        """Return the engine of what was built."""

    def runner(
        self,
        plan: Plan,
        engines: Mapping[str, Source],
        image_shape: tuple[int, int, int],
        precision: Precision,
    ) -> Runner:
        """Return the runner that is used, over the segments of ``plan`` and what moves rows."""


class EngineBuilder(Maker, Protocol):
    """Makes engines that are tied to a device."""

    @property
    def device(self) -> Device:
        """Device that they are tied to."""


class OnCpu:
    """Runs the graphs themselves, on ONNX Runtime; rows move as on a GPU."""

    tolerance = 0.0

    def __init__(self, batch: BatchProfile, name: GpuLibrary = "tensorrt") -> None:
        """Run batches as engines built for ``batch`` would, of the library called ``name``."""
        self._batch, self._name = batch, name

    def build(self, name: str, graph: bytes, shapes: Mapping[str, Shapes]) -> bytes:
        """Return the graph."""
        return graph

    def open(self, engine: Source) -> Engine:
        """Return an engine that answers as the graph's own will."""
        content = content_of(engine)
        return OrtEngine(for_cpu(ModelProto.FromString(content)).SerializeToString())

    def runner(
        self,
        plan: Plan,
        engines: Mapping[str, Source],
        image_shape: tuple[int, int, int],
        precision: Precision,
    ) -> Runner:
        """Return the runner that is used: rows are gathered, padded and put back as on a GPU."""
        return DeviceRunner.over_engines(
            plan,
            engines,
            image_shape,
            open_engine=lambda _, engine: self.open(engine),
            batch=self._batch,
            name=self._name,
            precision=precision,
        )


class GpuBuilder:
    """Builds engines on the GPU of this machine, the same graph once only."""

    # A GPU sums in another order, and by faster algorithms of convolution than a CPU.
    tolerance = 1e-4

    def __init__(self, options: BuildOptions) -> None:
        """Find the GPU.

        Raises:
            BackendUnavailableError: TensorRT, a driver or a GPU is missing.
        """
        self.device = this_device(version_compatible=options.version_compatible, tf32=options.tf32)
        self._options = options.with_timings(timing_cache_file(self.device))
        self._built: dict[str, bytes] = {}

    def build(self, name: str, graph: bytes, shapes: Mapping[str, Shapes]) -> bytes:
        """Return the serialised engine of a graph with inputs of these shapes."""
        key = hashlib.sha256(graph).hexdigest()
        if key not in self._built:
            kind = precision_of(ModelProto.FromString(graph))
            self._built[key] = build_engine(graph, shapes, self._options, precision=kind, name=name)
        return self._built[key]

    def open(self, engine: Source) -> Engine:
        """Return an engine, ready to run."""
        return TensorRtEngine(engine, device=self.device)

    def runner(
        self,
        plan: Plan,
        engines: Mapping[str, Source],
        image_shape: tuple[int, int, int],
        precision: Precision,
    ) -> Runner:
        """Return what ``--engine tensorrt`` opens."""
        return runner_of_engines(
            plan, engines, image_shape, device=self.device, precision=precision
        )


def engine_folder(precision: Precision, device: Device) -> str:
    """Return where in a bundle the engines for ``device`` are."""
    return f"engines/{FORMATS[device.library]}-{precision}-{device.slug}"


def write_engines(
    folder: Path,
    graphs: Mapping[str, ModelProto],
    shapes: Mapping[str, Mapping[str, Shapes]],
    maker: Maker,
) -> None:
    """Build the engine of every graph and write it to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, graph in graphs.items():
        engine = maker.build(name, graph.SerializeToString(), shapes[name])
        (folder / f"{name}{ENGINE_SUFFIX}").write_bytes(engine)


def check_set(
    staged: Path, plan: Plan, gate: AccuracyGate, maker: Maker, precision: Precision, *, tf32: bool
) -> Findings:
    """Return what the files of ``plan`` under ``staged`` answer in ``gate``, run as they will be.

    Raises:
        CheckFailedError: that is not good enough.
    """
    files = {name: staged / file for name, file in graph_files(plan).items()}
    channels, height, width = gate.parity.images.shape[1:]
    with maker.runner(plan, files, (channels, height, width), precision) as runner:
        findings = run_gate(replace(gate, tolerance=maker.tolerance), runner)
        # A lower precision was attacked as it was chosen; TF32 is what it is.
        if tf32 and precision == "fp32" and not findings.complaint:
            findings = attack_itself(gate, runner, findings)
    parity = findings.parity
    tolerance = max(parity.logit_tolerance, maker.tolerance)
    parity = parity.model_copy(update={"logit_tolerance": tolerance})
    folder = Path(plan.segments[0].file).parent.as_posix()
    if precision == "fp32" and not tf32:
        require_parity(parity, folder)
        require_any_batch(findings.batches, folder)
    elif findings.complaint:
        raise CheckFailedError(f"{folder}: {findings.complaint}; no bundle was written")
    return replace(findings, parity=parity)


def check_experts(
    staged: Path,
    plan: Plan,
    expected: Mapping[str, tuple[Arrays, Arrays]],
    maker: Maker,
    precisions: Precisions,
    *,
    tf32: bool,
) -> None:
    """Check the engine of every expert, visited or not.

    Args:
        staged: the bundle to be.
        plan: what the experts belong to.
        expected: by expert what it is given, and what it has to answer.
        maker: opens the engines.
        precisions: by segment.
        tf32: whether fp32 may be rounded to TF32.

    Raises:
        CheckFailedError: one answers something else.
    """
    for name in experts_of(plan):
        inputs, outputs = expected[name]
        ((output, right),) = outputs.items()
        with maker.open(staged / plan.segment(name).file) as engine:
            answer = engine.run(inputs)[output]
        # An expert may answer zeros to everything.
        error = float(np.linalg.norm(answer - right) / (np.linalg.norm(right) or 1.0))
        limit = max(_RESEMBLANCE[precisions[name]], _RESEMBLANCE_TF32 if tf32 else 0)
        if not error <= limit:
            raise CheckFailedError(
                f"the engine of {name} is off by {error:.2%} of its answer (limit {limit:.2%}); "
                "no bundle was written"
            )


def experts_of(plan: Plan) -> list[str]:
    """Return the names of the segments that are experts."""
    layers = [step for step in plan.steps if isinstance(step, ExpertsStep)]
    return [name for step in layers for name in step.segments]

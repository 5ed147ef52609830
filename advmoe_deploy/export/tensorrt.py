"""TensorRT sets: engines for the GPU of this machine, or the graphs that another machine builds.

The plan is the bundle's own, with routes inside of the segments that make their scores: an engine
each for those and for every expert, whose rows the runner sends there and back. Which segments run
at the lower precision is chosen as for other engines, by the runner that will be used: on the
engines themselves where there is a GPU, else over the same graphs in ONNX Runtime, whose roundings
are not TensorRT's.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import ModelProto

from advmoe_deploy.bundle import EngineDevice, EngineSet
from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.calibrate import calibrated
from advmoe_deploy.export.choose import Choice, Precisions, choose_precisions
from advmoe_deploy.export.engine_sets import Subject
from advmoe_deploy.export.every_expert import require_forced
from advmoe_deploy.export.exam import Findings, attack_itself, examine, precision_report
from advmoe_deploy.export.low_precision import fits_fp16, for_cpu, lowered, precision_of
from advmoe_deploy.export.movers import movers
from advmoe_deploy.export.onnx_graph import write_model
from advmoe_deploy.export.parity import require_parity
from advmoe_deploy.export.targets import Target, ladder
from advmoe_deploy.export.tensorrt_graphs import routes_in, tensorrt_plan, with_routes
from advmoe_deploy.export.trtexec import SCRIPT, build_script
from advmoe_deploy.plan import ExpertsStep
from advmoe_deploy.reports import Calibration, PrecisionReport
from advmoe_deploy.runtime.engine import Engine, Source
from advmoe_deploy.runtime.gathered_runner import GatheredRunner
from advmoe_deploy.runtime.ort_engine import OrtEngine
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.tensorrt_build import build_engine, timing_cache_file
from advmoe_deploy.runtime.tensorrt_device import this_device
from advmoe_deploy.runtime.tensorrt_engine import TensorRtEngine
from advmoe_deploy.runtime.tensorrt_plan import graph_files, runner_of_engines
from advmoe_deploy.runtime.tensorrt_shapes import shapes_of_segments
from advmoe_deploy.specs import Arithmetic, Precision

# A GPU sums in another order, and by faster algorithms of convolution than a CPU.
_FP32_TOLERANCE = 1e-4
# Of the norm of an expert's answer; more, and it is broken rather than rounded.
_RESEMBLANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.3, "int8": 0.5}
_RESEMBLANCE_TF32 = 0.02

Graphs = dict[str, ModelProto]


def write_tensorrt_set(staged: Path, target: Target, subject: Subject) -> EngineSet:
    """Write the engines or the graphs of ``target`` into the bundle under ``staged``.

    Raises:
        BackendUnavailableError: engines are wanted, and TensorRT or a GPU is missing.
        BundleError: TensorRT cannot read a graph.
        CheckFailedError: what lies there does not answer well enough.
    """
    writer = _Graphs if target.onnx_only else _Engines
    return writer(staged, target, subject).write()


class _Graphs:
    """Writes graphs, and checks them in ONNX Runtime."""

    suffix = ".onnx"
    device: EngineDevice | None = None

    def __init__(self, staged: Path, target: Target, subject: Subject) -> None:
        self.staged, self.target, self.subject = staged, target, subject
        self.source = subject.parts.plan
        self.shape = subject.reference.model.spec.image_shape
        self.quantised: Mapping[str, ModelProto] = {}
        self.calibration: Calibration | None = None
        self.folder = f"engines/trt-onnx-{target.precision}"
        self.prepare()
        self.plan = tensorrt_plan(self.source, self.folder, self.suffix)
        self.movers = {mover.name: mover for mover in movers(self.plan)}
        self.shapes = {
            **shapes_of_segments(self.plan, target.build.batch),
            **{name: each.shapes(target.build.batch) for name, each in self.movers.items()},
        }

    def prepare(self) -> None:
        """Find out what the set is for."""

    def write(self) -> EngineSet:
        """Choose the precision of each segment, write what runs, and check it as it lies there."""
        subject, target = self.subject, self.target
        if target.precision == "int8":
            self.quantised, self.calibration = calibrated(
                subject.reference.model,
                subject.parts,
                subject.labelled,
                subject.threat,
                symmetric=True,
            )
        choice = self._choose() if target.precision != "fp32" else None
        precisions = choice.precisions if choice else self._lowered()
        graphs = self._graphs(precisions)
        self._require_forced(graphs)
        self.write_files(self._with_movers(graphs), precisions)
        files = {name: self.staged / file for name, file in graph_files(self.plan).items()}
        findings = self._checked(files)
        self.check_experts(files, precisions)
        return EngineSet(
            backend=target.backend,
            precision=target.precision,
            plan=self.plan,
            device=self.device,
            arithmetic={name: _arithmetic(kind) for name, kind in precisions.items()},
            segments=precisions,
            parity=findings.parity,
            check=self._report(choice, findings),
            calibration=self.calibration,
        )

    def _report(self, choice: Choice | None, findings: Findings) -> PrecisionReport | None:
        if choice is None and not self.target.build.tf32:
            return None
        exam = self.subject.exam
        if choice is None:
            return precision_report(exam, {}, findings)
        return precision_report(exam, choice.raised, choice.findings)

    def write_files(self, graphs: Graphs, precisions: Precisions) -> None:
        """Write the graphs and the script that builds them."""
        for name, graph in graphs.items():
            write_model(graph, self.file(name))
        script = self.staged / self.folder / SCRIPT
        script.write_text(
            build_script(self.shapes, precisions, self.target.build), encoding="utf-8"
        )
        script.chmod(0o755)

    def file(self, name: str) -> Path:
        """Return where the graph or the engine called ``name`` goes."""
        return self.staged / self.folder / f"{name}{self.suffix}"

    def compiled(self, name: str, graph: bytes) -> bytes:
        """Return what runs instead of a graph: here, the graph itself."""
        return graph

    def runner(self, sources: Mapping[str, Source]) -> Runner:
        """Return the runner that is used, over everything that it uses: what is :meth:`compiled`.

        Rows are gathered, padded and put back as on a GPU, here on ONNX Runtime.
        """
        return GatheredRunner.over_engines(
            self.plan,
            sources,
            self.shape,
            open_engine=_open_on_cpu,
            batch=self.target.build.batch,
            name=self.target.backend,
            precision=self.target.precision,
        )

    def check_experts(self, files: Mapping[str, Path], precisions: Precisions) -> None:
        """Check every expert by itself, where the graphs' own check does not cover what runs."""

    def _lowered(self) -> Precisions:
        """Return the target's precision for every segment that has it."""
        wanted, graphs = self.target.precision, self.subject.parts.graphs

        def able(name: str) -> bool:
            if wanted == "int8":
                return name in self.quantised
            return wanted != "fp16" or fits_fp16(graphs[name])

        return {name: wanted if able(name) else "fp32" for name in graphs}

    def _choose(self) -> Choice:
        def trial(precisions: Precisions) -> Findings:
            exam = self.subject.exam
            with self._in_memory(self._graphs(precisions)) as runner:
                findings = examine(exam, runner)
                if findings.complaint:
                    return findings
                return replace(findings, own_attack=attack_itself(exam, runner))

        def glance(precisions: Precisions) -> Findings:
            with self._in_memory(self._graphs(precisions)) as runner:
                return examine(self.subject.exam, runner)

        return choose_precisions(self.source, self._lowered(), ladder(self.target), trial, glance)

    def _graphs(self, precisions: Precisions) -> Graphs:
        return {name: self._graph(name, kind) for name, kind in precisions.items()}

    def _graph(self, name: str, precision: Precision) -> ModelProto:
        own = self.subject.parts.graphs[name]
        routes = routes_in(self.source, self.source.segment(name))
        graph = self.quantised[name] if precision == "int8" else own
        whole = with_routes(graph, routes, self.plan.segment(name))
        return lowered(whole, _arithmetic(precision), routes)

    def _with_movers(self, graphs: Mapping[str, ModelProto]) -> Graphs:
        return {**graphs, **{name: mover.graph for name, mover in self.movers.items()}}

    def _in_memory(self, graphs: Mapping[str, ModelProto]) -> Runner:
        whole = self._with_movers(graphs).items()
        return self.runner({n: self.compiled(n, g.SerializeToString()) for n, g in whole})

    def _require_forced(self, graphs: Graphs) -> None:
        """Check the graphs with each expert preferred in turn, in ONNX Runtime."""

        def forced(changed: Mapping[str, ModelProto]) -> Runner:
            whole = self._with_movers(changed).items()
            return _Graphs.runner(self, {name: g.SerializeToString() for name, g in whole})

        subject = self.subject
        require_forced(
            subject.reference, self.source, graphs, subject.few, forced, self.target.precision
        )

    def _checked(self, files: Mapping[str, Path]) -> Findings:
        with self.runner(files) as runner:
            findings = self.tolerant(examine(self.subject.exam, runner))
        if self.target.precision == "fp32" and not self.target.build.tf32:
            require_parity(findings.parity, self.folder)
        elif findings.complaint:
            raise CheckFailedError(f"{self.folder}: {findings.complaint}; no bundle was written")
        return findings

    def tolerant(self, findings: Findings) -> Findings:
        """Return ``findings`` with the tolerance of whoever answered."""
        return findings


class _Engines(_Graphs):
    """Builds engines, and checks them on the GPU."""

    suffix = ".engine"

    def prepare(self) -> None:
        """Tie the set to this machine."""
        build = self.target.build
        device = this_device(version_compatible=build.version_compatible, tf32=build.tf32)
        self.device = device
        self.folder = f"engines/trt-{self.target.precision}-{device.slug}"
        self.options = build.with_timings(timing_cache_file(device))
        self._built: dict[str, bytes] = {}

    def write_files(self, graphs: Graphs, precisions: Precisions) -> None:
        """Build every engine and write it."""
        for name, graph in graphs.items():
            engine = self.compiled(name, graph.SerializeToString())
            self.file(name).parent.mkdir(parents=True, exist_ok=True)
            self.file(name).write_bytes(engine)

    def compiled(self, name: str, graph: bytes) -> bytes:
        """Return the engine that TensorRT builds of a graph, built once."""
        key = hashlib.sha256(graph).hexdigest()
        if key not in self._built:
            kind = precision_of(ModelProto.FromString(graph))
            self._built[key] = build_engine(
                graph, self.shapes[name], self.options, precision=kind, name=name
            )
        return self._built[key]

    def runner(self, sources: Mapping[str, Source]) -> Runner:
        """Return what ``--engine tensorrt`` opens, over engines."""
        return runner_of_engines(
            self.plan,
            sources,
            self.shape,
            device=self.device,
            precision=self.target.precision,
        )

    def tolerant(self, findings: Findings) -> Findings:
        """Return ``findings`` with a GPU's tolerance."""
        parity = findings.parity
        tolerance = max(parity.logit_tolerance, _FP32_TOLERANCE)
        changed = parity.model_copy(update={"logit_tolerance": tolerance})
        return replace(findings, parity=changed)

    def check_experts(self, files: Mapping[str, Path], precisions: Precisions) -> None:
        """Check every expert's engine on what the torch model gives it, visited or not.

        Raises:
            CheckFailedError: one answers something else.
        """
        few = self.subject.few[: self.target.build.batch.max]
        samples = self.subject.parts.samples(few)
        layers = [step for step in self.plan.steps if isinstance(step, ExpertsStep)]
        for name in [name for step in layers for name in step.segments]:
            (output,) = samples[name].outputs.items()
            with TensorRtEngine(files[name], device=self.device) as engine:
                answer = engine.run(samples[name].inputs)[output[0]]
            error = float(np.linalg.norm(answer - output[1]) / np.linalg.norm(output[1]))
            limit = _RESEMBLANCE[precisions[name]]
            if self.target.build.tf32:
                limit = max(limit, _RESEMBLANCE_TF32)
            if not error <= limit:
                raise CheckFailedError(
                    f"the engine of {name} differs from the torch model by {error:.2%} of its "
                    f"answer (limit {limit:.2%}); no bundle was written"
                )


def _open_on_cpu(name: str, source: Source) -> Engine:
    """Return an engine of ONNX Runtime that answers as the graph's own will."""
    content = source if isinstance(source, bytes) else source.read_bytes()
    return OrtEngine(for_cpu(ModelProto.FromString(content)).SerializeToString())


def _arithmetic(precision: Precision) -> Arithmetic:
    """Return what a segment computes in, quantised parts aside."""
    return "fp32" if precision == "int8" else precision

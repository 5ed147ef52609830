"""TensorRT sets: engines for the GPU of this machine, or the graphs that another machine builds.

The plan is the bundle's own, with routes inside of the segments that make their scores: an engine
each for those and for every expert, whose rows the runner sends there and back. Which segments run
at the lower precision is chosen as for other engines, by the runner that will be used: on the
engines themselves where there is a GPU, else over the same graphs in ONNX Runtime, whose roundings
are not TensorRT's.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from onnx import ModelProto

from advmoe_deploy.bundle import EngineDevice, EngineSet
from advmoe_deploy.export.checks.every_expert import require_forced
from advmoe_deploy.export.engine_sets import Subject
from advmoe_deploy.export.graph.writer import write_model
from advmoe_deploy.export.precision.calibrate import calibrated
from advmoe_deploy.export.precision.casts import fits_fp16, lowered
from advmoe_deploy.export.precision.gate import Findings, attack_itself, examine, precision_report
from advmoe_deploy.export.precision.search import Choice, Precisions, choose_precisions
from advmoe_deploy.export.targets import Target, ladder
from advmoe_deploy.export.tensorrt.builders import (
    SUFFIX,
    GpuBuilder,
    Maker,
    OnCpu,
    check_experts,
    check_set,
    engine_folder,
    experts_of,
    write_engines,
)
from advmoe_deploy.export.tensorrt.graphs import routes_in, tensorrt_plan, with_routes
from advmoe_deploy.export.tensorrt.row_graphs import movers
from advmoe_deploy.export.tensorrt.trtexec import SCRIPT, build_script
from advmoe_deploy.reports import Calibration, PrecisionReport
from advmoe_deploy.runtime.engine import Source
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.tensorrt.shapes import shapes_of_segments
from advmoe_deploy.specs import Arithmetic, Precision

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
        self.maker = self.prepare()
        self.plan = tensorrt_plan(self.source, self.folder, self.suffix)
        self.movers = {mover.name: mover for mover in movers(self.plan)}
        self.shapes = {
            **shapes_of_segments(self.plan, target.build.batch),
            **{name: each.shapes(target.build.batch) for name, each in self.movers.items()},
        }

    def prepare(self) -> Maker:
        """Return what makes and runs what is written, and find out what that is tied to."""
        return OnCpu(self.target.build.batch)

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
        findings = self.checked(precisions)
        return EngineSet(
            backend=target.backend,
            precision=target.precision,
            plan=self.plan,
            device=self.device,
            arithmetic={name: self._arithmetic(name, kind) for name, kind in precisions.items()},
            segments=precisions,
            parity=findings.parity,
            check=self._report(choice, findings),
            calibration=self.calibration,
        )

    def _report(self, choice: Choice | None, findings: Findings) -> PrecisionReport | None:
        if self.target.is_exact:
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
        return lowered(whole, self._arithmetic(name, precision), routes)

    def _arithmetic(self, name: str, precision: Precision) -> Arithmetic:
        """Return what a segment computes in, quantised parts aside."""
        if precision != "int8":
            return precision
        return self.target.build.unquantised_dtype if fits_fp16(self.quantised[name]) else "fp32"

    def _with_movers(self, graphs: Mapping[str, ModelProto]) -> Graphs:
        return {**graphs, **{name: mover.graph for name, mover in self.movers.items()}}

    def _in_memory(self, graphs: Mapping[str, ModelProto]) -> Runner:
        whole = self._with_movers(graphs).items()
        build, shapes = self.maker.build, self.shapes
        return self._runner({n: build(n, g.SerializeToString(), shapes[n]) for n, g in whole})

    def _runner(self, sources: Mapping[str, Source], maker: Maker | None = None) -> Runner:
        maker = maker or self.maker
        return maker.runner(self.plan, sources, self.shape, self.target.precision)

    def _require_forced(self, graphs: Graphs) -> None:
        """Check the graphs with each expert preferred in turn, in ONNX Runtime."""

        def forced(changed: Mapping[str, ModelProto]) -> Runner:
            whole = self._with_movers(changed).items()
            return self._runner({name: g.SerializeToString() for name, g in whole}, on_cpu)

        subject, on_cpu = self.subject, OnCpu(self.target.build.batch)
        require_forced(
            subject.reference, self.source, graphs, subject.few, forced, self.target.precision
        )

    def checked(self, precisions: Precisions) -> Findings:
        """Return what the files answer as they lie there.

        Raises:
            CheckFailedError: that is not good enough.
        """
        exam, target = self.subject.exam, self.target
        return check_set(
            self.staged, self.plan, exam, self.maker, target.precision, tf32=target.tf32
        )


class _Engines(_Graphs):
    """Builds engines, and checks them on the GPU."""

    suffix = SUFFIX

    def prepare(self) -> Maker:
        """Tie the set to this machine."""
        builder = GpuBuilder(self.target.build)
        self.device = builder.device
        self.folder = engine_folder(self.target.precision, builder.device)
        return builder

    def write_files(self, graphs: Graphs, precisions: Precisions) -> None:
        """Build every engine and write it."""
        write_engines(self.staged / self.folder, graphs, self.shapes, self.maker)

    def checked(self, precisions: Precisions) -> Findings:
        """Return what the engines answer as they lie there; every expert's is run by itself, too.

        Raises:
            CheckFailedError: one answers something else, or all of them not well enough.
        """
        few = self.subject.few[: self.target.build.batch.max]
        samples = self.subject.parts.samples(few)
        expected = {n: (samples[n].inputs, samples[n].outputs) for n in experts_of(self.plan)}
        tf32 = self.target.tf32
        check_experts(self.staged, self.plan, expected, self.maker, precisions, tf32=tf32)
        return super().checked(precisions)

"""Backend for TensorRT: engines for this machine's GPU, or graphs that another one builds.

The plan is the bundle's own, with routes inside of the segments that make their scores: an engine
each for those and for every expert, whose rows the runner sends there and back. Which segments run
at the lower precision is chosen as for other engines, by the runner that will be used: on the
engines themselves where they run, else over the same graphs in ONNX Runtime, whose roundings are
not TensorRT's. RTX's engines are compiled anywhere, and so are tried in ONNX Runtime.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from onnx import ModelProto

from advmoe_deploy.export.checks.every_expert import require_forced
from advmoe_deploy.export.graph.writer import write_model
from advmoe_deploy.export.precision.casts import fits_fp16, lowered
from advmoe_deploy.export.precision.gate import Findings
from advmoe_deploy.export.precision.search import Precisions
from advmoe_deploy.export.subject import Subject
from advmoe_deploy.export.targets import Target
from advmoe_deploy.export.tensorrt.builders import (
    ENGINE_SUFFIX,
    Maker,
    OnCpu,
    check_experts,
    check_set,
    engine_folder,
    experts_of,
    write_engines,
)
from advmoe_deploy.export.tensorrt.graphs import routes_in, tensorrt_plan, with_routes
from advmoe_deploy.export.tensorrt.row_graphs import row_graphs
from advmoe_deploy.export.tensorrt.rtx import engine_builder
from advmoe_deploy.export.tensorrt.trtexec import SCRIPT, build_script
from advmoe_deploy.reports.devices import Device, GpuLibrary
from advmoe_deploy.runtime.engine import Source
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.tensorrt.shapes import shapes_of_segments
from advmoe_deploy.specs import ComputeDtype, Precision

Graphs = dict[str, ModelProto]


@dataclass(frozen=True)
class _Lowered:
    """Graphs with their routes inside, and the compute dtype of each, quantised parts aside."""

    graphs: Graphs
    precisions: Precisions
    compute_dtypes: dict[str, ComputeDtype]


class TensorRtBackend:
    """Builds the engines of one target or, if that is ``onnx_only``, writes their graphs."""

    symmetric = True
    is_timed = False

    def __init__(self, target: Target, subject: Subject) -> None:
        """Find the GPU, if engines are wanted.

        Raises:
            BackendUnavailableError: TensorRT or a GPU is missing.
        """
        self.target, self.subject = target, subject
        self.source, batch = subject.parts.plan, target.build.batch
        self.shape = subject.reference.model.spec.image_shape
        self.maker: Maker = OnCpu(batch)
        self.writer: Maker = self.maker
        self.device: Device | None = None
        folder, suffix = f"engines/trt-onnx-{target.precision}", ".onnx"
        if not target.onnx_only:
            library: GpuLibrary = "tensorrt" if target.backend == "tensorrt" else "tensorrt-rtx"
            builder = engine_builder(library, target.build)
            self.writer, self.device = builder, builder.device
            # What engines would answer is tried on engines, if they run here.
            self.maker = builder if target.backend == "tensorrt" else self.maker
            folder, suffix = engine_folder(target.precision, builder.device), ENGINE_SUFFIX
        self.plan = tensorrt_plan(self.source, folder, suffix)
        self.folder = folder
        self.row_graphs = {row_graph.name: row_graph for row_graph in row_graphs(self.plan)}
        self.shapes = {
            **shapes_of_segments(self.plan, batch),
            **{name: each.shapes(batch) for name, each in self.row_graphs.items()},
        }

    def can_lower(self, graph: ModelProto) -> bool:
        """Return whether every constant of a segment is one at the target's precision."""
        return self.target.precision != "fp16" or fits_fp16(graph)

    def lower(self, graphs: Mapping[str, ModelProto], precisions: Precisions) -> _Lowered:
        """Return the graphs that TensorRT builds at these precisions."""
        kinds = {n: self._compute_dtype(graphs[n], kind) for n, kind in precisions.items()}
        return _Lowered(
            {name: self._graph(name, graphs[name], kind) for name, kind in kinds.items()},
            precisions,
            kinds,
        )

    def open(self, lowered: _Lowered) -> Sequence[Callable[[], Runner]]:
        """Return what opens the runner that is used, over engines built for it."""
        return (partial(self._built, lowered.graphs),)

    def write(self, lowered: _Lowered, staged: Path) -> None:
        """Write engines, or graphs and the script that builds them, once no expert is missing.

        Raises:
            CheckFailedError: a graph answers otherwise than the torch model, with an expert forced.
        """
        self._require_forced(lowered.graphs)
        graphs = self._with_row_graphs(lowered.graphs)
        if not self.target.onnx_only:
            write_engines(staged / self.folder, graphs, self.shapes, self.writer)
            return
        for name, graph in graphs.items():
            write_model(graph, staged / self.folder / f"{name}.onnx")
        script = staged / self.folder / SCRIPT
        text = build_script(self.shapes, graphs, lowered.precisions, self.target.build)
        script.write_text(text, encoding="utf-8")
        script.chmod(0o755)

    def check(self, lowered: _Lowered, staged: Path) -> Findings:
        """Return what the files answer as they lie there; every expert's engine is run alone, too.

        Raises:
            CheckFailedError: one answers something else, or all of them not well enough.
        """
        target = self.target
        if not target.onnx_only:
            few = self.subject.few[: target.build.batch.max]
            samples = self.subject.parts.samples(few)
            expected = {n: (samples[n].inputs, samples[n].outputs) for n in experts_of(self.plan)}
            check_experts(
                staged, self.plan, expected, self.writer, lowered.precisions, tf32=target.tf32
            )
        return check_set(
            staged, self.plan, self.subject.gate, self.writer, target.precision, tf32=target.tf32
        )

    def record(self, lowered: _Lowered) -> dict[str, Any]:
        """Return the plan over these engines, their compute dtypes and the device."""
        return {"plan": self.plan, "device": self.device, "compute_dtypes": lowered.compute_dtypes}

    def _graph(self, name: str, graph: ModelProto, kind: ComputeDtype) -> ModelProto:
        routes = routes_in(self.source, self.source.segment(name))
        return lowered(with_routes(graph, routes, self.plan.segment(name)), kind, routes)

    def _compute_dtype(self, graph: ModelProto, precision: Precision) -> ComputeDtype:
        """Return what a segment computes in, quantised parts aside."""
        if precision != "int8":
            return precision
        return self.target.build.unquantised_dtype if fits_fp16(graph) else "fp32"

    def _with_row_graphs(self, graphs: Mapping[str, ModelProto]) -> Graphs:
        return {**graphs, **{name: row_graph.graph for name, row_graph in self.row_graphs.items()}}

    def _built(self, graphs: Mapping[str, ModelProto]) -> Runner:
        whole, build, shapes = self._with_row_graphs(graphs).items(), self.maker.build, self.shapes
        return self._runner({n: build(n, g.SerializeToString(), shapes[n]) for n, g in whole})

    def _runner(self, sources: Mapping[str, Source], maker: Maker | None = None) -> Runner:
        maker = maker or self.maker
        return maker.runner(self.plan, sources, self.shape, self.target.precision)

    def _require_forced(self, graphs: Graphs) -> None:
        """Check the graphs with each expert preferred in turn, in ONNX Runtime."""

        def forced(changed: Mapping[str, ModelProto]) -> Runner:
            whole = self._with_row_graphs(changed).items()
            return self._runner({name: g.SerializeToString() for name, g in whole}, on_cpu)

        subject, on_cpu = self.subject, OnCpu(self.target.build.batch)
        require_forced(
            subject.reference, self.source, graphs, subject.few, forced, self.target.precision
        )

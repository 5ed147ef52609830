"""Backend for CPUs, ONNX Runtime and OpenVINO: few graphs that route inside, and the plan's own.

Segments at one compute dtype share a graph; a bundle holds those, and beside them each segment that
was quantised, for runners that dispatch rows themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from advmoe_deploy.errors import BundleError, CheckFailedError
from advmoe_deploy.export.checks.every_expert import require_forced, require_weights
from advmoe_deploy.export.graph.fuse import Fused, fuse
from advmoe_deploy.export.graph.writer import write_model
from advmoe_deploy.export.precision.gate import Findings, run_gate
from advmoe_deploy.export.precision.search import Precisions
from advmoe_deploy.export.subject import Subject
from advmoe_deploy.export.targets import Target
from advmoe_deploy.parity.batches import require_any_batch
from advmoe_deploy.parity.compare import require_parity
from advmoe_deploy.plan import ExpertsStep, Plan, Segment
from advmoe_deploy.runtime.engine import Source
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.select import compute_dtypes_of, engine_opener


@dataclass(frozen=True)
class _Lowered:
    """The bundle's own plan, the graphs of its segments, and the few graphs they are fused to."""

    plan: Plan
    graphs: Mapping[str, ModelProto]
    precisions: Precisions
    fused: Fused


class CpuBackend:
    """Makes the graphs of one target."""

    symmetric = False
    is_timed = True

    def __init__(self, target: Target, subject: Subject) -> None:
        self.target, self.subject = target, subject
        self.plan = subject.parts.plan
        self.shape = subject.reference.model.spec.image_shape
        self._empty: dict[tuple[str, str], bool] = {}

    def can_lower(self, graph: ModelProto) -> bool:
        """Return whether a segment has the target's precision: all have."""
        return True

    def lower(self, graphs: Mapping[str, ModelProto], precisions: Precisions) -> _Lowered:
        """Return the graphs at these precisions, by segment and fused."""
        plan = self._plan_at(precisions)
        on_host = self.target.backend == "openvino"
        fused = fuse(
            plan,
            graphs,
            compute_dtypes_of(precisions),
            folder=self.target.folder,
            form="gather" if on_host else "if",
            for_host=self._for_host(plan, graphs, precisions) if on_host else (),
        )
        return _Lowered(plan, graphs, precisions, fused)

    def open(self, lowered: _Lowered) -> Sequence[Callable[[], Runner]]:
        """Return what opens the fused graphs, and the segments one by one."""
        fused = lowered.fused
        return (
            lambda: self._runner(fused, _serialised(fused.graphs)),
            lambda: self._by_segment(lowered, _serialised(lowered.graphs)),
        )

    def write(self, lowered: _Lowered, staged: Path) -> None:
        """Write the graphs that the bundle does not hold in fp32 already."""
        graphs = {**lowered.graphs, **lowered.fused.graphs}
        for segment in [*lowered.plan.segments, *lowered.fused.plan.segments]:
            if segment.file.startswith(f"{self.target.folder}/"):
                write_model(graphs[segment.name], staged / segment.file)

    def check(self, lowered: _Lowered, staged: Path) -> Findings:
        """Return what the files answer, as few graphs and segment by segment.

        Raises:
            CheckFailedError: that is not good enough, or a weight or an expert is not there.
        """
        subject, fused = self.subject, lowered.fused
        own = {s.name: staged / s.file for s in lowered.plan.segments}
        files = {s.name: staged / s.file for s in fused.plan.segments}
        graphs = {name: onnx.load_model(file) for name, file in files.items()}
        segments = {name: onnx.load_model(file) for name, file in own.items()}
        require_weights(graphs, segments, self.target.folder)
        with self._by_segment(lowered, own) as by_segment:
            self._require(run_gate(subject.gate, by_segment), f"the plan in {self.target.folder}")
        with self._runner(fused, files) as runner:
            findings = run_gate(subject.gate, runner)
        self._require(findings, self.target.folder)

        def forced(changed: Mapping[str, ModelProto]) -> Runner:
            return self._runner(fused, _serialised(changed))

        require_forced(
            subject.reference, self.plan, graphs, subject.few, forced, self.target.precision
        )
        return findings

    def record(self, lowered: _Lowered) -> dict[str, Any]:
        """Return the fused plan, and the files of segments that are not the bundle's own."""
        own = {s.name: s.file for s in self.plan.segments}
        return {
            "plan": lowered.fused.plan,
            "compute_dtypes": lowered.fused.compute_dtypes,
            "files": {s.name: s.file for s in lowered.plan.segments if s.file != own[s.name]},
        }

    def _plan_at(self, precisions: Precisions) -> Plan:
        """Return the bundle's own plan, whose quantised segments lie in the target's folder."""

        def placed(segment: Segment) -> Segment:
            if precisions[segment.name] != "int8":
                return segment
            return segment.model_copy(update={"file": f"{self.target.folder}/{segment.file}"})

        return self.plan.model_copy(update={"segments": tuple(map(placed, self.plan.segments))})

    def _for_host(
        self, plan: Plan, graphs: Mapping[str, ModelProto], precisions: Precisions
    ) -> set[str]:
        """Return the layers with an expert that cannot run on no rows.

        OpenVINO refuses to pool no rows, and some of its own rewritings make poolings, so each
        expert is tried: on two threads, for on one it does not refuse, and may crash.
        """

        def can_be_empty(name: str) -> bool:
            key = name, precisions[name]
            if key not in self._empty:
                self._empty[key] = self._runs_on_no_rows(plan.segment(name), graphs, precisions)
            return self._empty[key]

        experts = [step for step in plan.steps if isinstance(step, ExpertsStep)]
        return {step.layer for step in experts if not all(map(can_be_empty, step.segments))}

    def _runs_on_no_rows(
        self, segment: Segment, graphs: Mapping[str, ModelProto], precisions: Precisions
    ) -> bool:
        dtypes = compute_dtypes_of(precisions)
        open_engine = engine_opener(self.target.backend, dtypes, threads=2)
        (rows,) = segment.inputs
        nothing = np.empty((0, *(int(size) for size in rows.shape[1:])), np.float32)
        with open_engine(segment.name, graphs[segment.name].SerializeToString()) as engine:
            try:
                engine.run({rows.name: nothing})
            except BundleError:
                return False
        return True

    def _runner(self, fused: Fused, graphs: Mapping[str, Source]) -> Runner:
        return PlanRunner(
            fused.plan,
            graphs,
            self.shape,
            routes=self.plan.routes,
            open_engine=engine_opener(self.target.backend, fused.compute_dtypes),
            name=self.target.backend,
            precision=self.target.precision,
        )

    def _by_segment(self, lowered: _Lowered, graphs: Mapping[str, Source]) -> Runner:
        opener = engine_opener(self.target.backend, compute_dtypes_of(lowered.precisions))
        return PlanRunner(
            lowered.plan,
            graphs,
            self.shape,
            open_engine=opener,
            precision=self.target.precision,
        )

    def _require(self, findings: Findings, what: str) -> None:
        if self.target.precision == "fp32":
            require_parity(findings.parity, what)
            require_any_batch(findings.batches, what)
        elif findings.complaint:
            raise CheckFailedError(f"{what}: {findings.complaint}; no bundle was written")


def _serialised(graphs: Mapping[str, ModelProto]) -> dict[str, Source]:
    return {name: graph.SerializeToString() for name, graph in graphs.items()}

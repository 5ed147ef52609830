"""Writes the graphs for one backend at one precision, and checks them as they lie there."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from advmoe_deploy.bundle import EngineSet
from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.errors import BundleError, CheckFailedError
from advmoe_deploy.export.checks.every_expert import require_forced, require_weights
from advmoe_deploy.export.checks.golden import golden_rows
from advmoe_deploy.export.graph.fuse import Fused, fuse
from advmoe_deploy.export.graph.stitch import Form
from advmoe_deploy.export.graph.writer import write_model
from advmoe_deploy.export.partition.cut import Partition
from advmoe_deploy.export.precision.attacked import with_accuracy
from advmoe_deploy.export.precision.calibrate import calibrated
from advmoe_deploy.export.precision.gate import (
    Exam,
    Examples,
    Findings,
    attack_itself,
    examine,
    precision_report,
)
from advmoe_deploy.export.precision.search import Choice, Precisions, choose_precisions
from advmoe_deploy.export.targets import Target, ladder
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.parity.answers import Images
from advmoe_deploy.parity.compare import require_parity
from advmoe_deploy.parity.reference import Reference
from advmoe_deploy.plan import ExpertsStep, Plan, Segment
from advmoe_deploy.reports import Calibration, PrecisionReport, RouterPrecision
from advmoe_deploy.runtime.engine import Source
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.select import arithmetic_of, engine_opener
from advmoe_deploy.specs import Precision, ThreatModel

# Images that each expert is forced on.
_FEW = 16
_TIMED_BATCH = 64
_TIMED_ROUNDS = 10


@dataclass(frozen=True)
class Subject:
    """What is exported: the torch model, its plan in fp32, and what it is examined on.

    ``labelled`` has the images that int8 is calibrated on, ``threat`` how they are attacked.
    """

    reference: Reference
    parts: Partition
    exam: Exam
    few: Images
    labelled: Dataset | None
    threat: ThreatModel | None


def subject_of(
    model: Classifier,
    parts: Partition,
    parity: Examples,
    *,
    data: str,
    labelled: Dataset | None,
    threat: ThreatModel | None,
) -> Subject:
    """Return what is exported; ``parity`` is of images from ``data``.

    With ``labelled``, accuracy is measured on its hold-out, clean and under ``threat``.
    """
    reference = Reference(model)
    few = parity.images[golden_rows(parity.answers)][:_FEW]
    exam = Exam(parity, data, reference.rounding(few))
    if labelled is not None:
        exam = with_accuracy(exam, model, labelled, threat)
    return Subject(reference, parts, exam, few, labelled, threat)


def write_engine_set(staged: Path, target: Target, subject: Subject) -> EngineSet:
    """Write the graphs of ``target`` into the bundle under ``staged`` and return their record.

    Raises:
        CheckFailedError: what lies there does not answer well enough.
    """
    return _Writer(staged, target, subject).write()


class _Writer:
    def __init__(self, staged: Path, target: Target, subject: Subject) -> None:
        self.staged, self.target, self.subject = staged, target, subject
        self.plan = subject.parts.plan
        self.shape = subject.reference.model.spec.image_shape
        self.quantised: Mapping[str, ModelProto] = {}
        self.calibration: Calibration | None = None
        self._empty: dict[tuple[str, Precision], bool] = {}

    def write(self) -> EngineSet:
        """Choose the precision of each segment, write the graphs and check them."""
        subject = self.subject
        if self.target.precision == "int8":
            self.quantised, self.calibration = calibrated(
                subject.reference.model, subject.parts, subject.labelled, subject.threat
            )
        choice = self._choose() if self.target.precision != "fp32" else None
        precisions = choice.precisions if choice else self._lowered()
        plan, graphs = self._segments(precisions)
        fused = self._fused(precisions)
        for segment in [*plan.segments, *fused.plan.segments]:
            if segment.file.startswith(f"{self.target.folder}/"):
                graph = {**graphs, **fused.graphs}[segment.name]
                write_model(graph, self.staged / segment.file)
        findings = self._checked(fused, precisions)
        own = {s.name: s.file for s in self.plan.segments}
        return EngineSet(
            backend=self.target.backend,
            precision=self.target.precision,
            plan=fused.plan,
            arithmetic=fused.arithmetic,
            segments=precisions,
            files={s.name: s.file for s in plan.segments if s.file != own[s.name]},
            parity=findings.parity,
            check=self._report(choice, fused) if choice else None,
            calibration=self.calibration,
        )

    def _lowered(self) -> Precisions:
        """Return the target's precision for every segment that has it."""
        able = self.quantised if self.target.precision == "int8" else self.subject.parts.graphs
        return {
            n: self.target.precision if n in able else "fp32" for n in self.subject.parts.graphs
        }

    def _choose(self) -> Choice:
        def trial(precisions: Precisions) -> Findings:
            exam = self.subject.exam
            with self._in_memory(self._fused(precisions)) as runner:
                findings = examine(exam, runner)
                if findings.complaint:
                    return findings
                # Segment by segment roundings differ a little, and that has to pass as well.
                plan, graphs = self._segments(precisions)
                sources = {name: graph.SerializeToString() for name, graph in graphs.items()}
                with self._by_segment(plan, sources, precisions) as by_segment:
                    other = examine(exam, by_segment)
                if other.complaint:
                    return other
                # Last, for it takes longest.
                return replace(findings, own_attack=attack_itself(exam, runner))

        def glance(precisions: Precisions) -> Findings:
            with self._in_memory(self._fused(precisions)) as runner:
                return examine(self.subject.exam, runner)

        return choose_precisions(self.plan, self._lowered(), ladder(self.target), trial, glance)

    def _segments(self, precisions: Precisions) -> tuple[Plan, dict[str, ModelProto]]:
        """Return the bundle's own plan, and the graph of each segment, at these precisions."""
        graphs = dict(self.subject.parts.graphs)
        segments = []
        for segment in self.plan.segments:
            if precisions[segment.name] == "int8":
                graphs[segment.name] = self.quantised[segment.name]
                file = f"{self.target.folder}/{segment.file}"
                segment = segment.model_copy(update={"file": file})
            segments.append(segment)
        return self.plan.model_copy(update={"segments": tuple(segments)}), graphs

    def _fused(self, precisions: Precisions) -> Fused:
        plan, graphs = self._segments(precisions)
        form: Form = "if" if self.target.backend == "onnxruntime" else "gather"
        return fuse(
            plan,
            graphs,
            arithmetic_of(precisions),
            folder=self.target.folder,
            form=form,
            for_host=self._for_host(plan, graphs, precisions) if form == "gather" else (),
        )

    def _for_host(
        self, plan: Plan, graphs: Mapping[str, ModelProto], precisions: Precisions
    ) -> set[str]:
        """Return the layers with an expert that cannot run on no rows.

        OpenVINO refuses to pool no rows, and some of its own rewritings make poolings, so each
        expert is tried.
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
        open_engine = engine_opener(self.target.backend, arithmetic_of(precisions))
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
            open_engine=engine_opener(self.target.backend, fused.arithmetic),
            name=self.target.backend,
            precision=self.target.precision,
        )

    def _by_segment(
        self, plan: Plan, graphs: Mapping[str, Source], precisions: Precisions
    ) -> Runner:
        opener = engine_opener(self.target.backend, arithmetic_of(precisions))
        return PlanRunner(plan, graphs, self.shape, open_engine=opener)

    def _in_memory(self, fused: Fused) -> Runner:
        return self._runner(fused, {n: g.SerializeToString() for n, g in fused.graphs.items()})

    def _checked(self, fused: Fused, precisions: Precisions) -> Findings:
        """Return what the files answer, as few graphs and segment by segment.

        Raises:
            CheckFailedError: that is not good enough, or a weight or an expert is not there.
        """
        subject = self.subject
        plan, _ = self._segments(precisions)
        own = {s.name: self.staged / s.file for s in plan.segments}
        files = {s.name: self.staged / s.file for s in fused.plan.segments}
        graphs = {name: onnx.load_model(file) for name, file in files.items()}
        segments = {name: onnx.load_model(file) for name, file in own.items()}
        require_weights(graphs, segments, self.target.folder)
        with self._by_segment(plan, own, precisions) as by_segment:
            self._require(examine(subject.exam, by_segment), f"the plan in {self.target.folder}")
        with self._runner(fused, files) as runner:
            findings = examine(subject.exam, runner)
        self._require(findings, self.target.folder)

        def forced(changed: Mapping[str, ModelProto]) -> Runner:
            return self._runner(fused, {n: g.SerializeToString() for n, g in changed.items()})

        require_forced(
            subject.reference, self.plan, graphs, subject.few, forced, self.target.precision
        )
        return findings

    def _require(self, findings: Findings, what: str) -> None:
        if self.target.precision == "fp32":
            require_parity(findings.parity, what)
        elif findings.complaint:
            raise CheckFailedError(f"{what}: {findings.complaint}; no bundle was written")

    def _report(self, choice: Choice, shipped: Fused) -> PrecisionReport:
        # What was measured as the choice was made, of the same graphs in memory: the attack on the
        # engine takes too long to be run again on the files.
        findings, lowered = choice.findings, choice.lowered
        router = self._router_cost(lowered, findings, shipped) if lowered else None
        return precision_report(self.subject.exam, choice.raised, findings, router)

    def _router_cost(
        self, lowered: Findings, findings: Findings, shipped: Fused
    ) -> RouterPrecision:
        """Return what it costs that the routers stayed in fp32: times of both, taken in turn."""
        images = self.subject.exam.parity.images
        batch = np.resize(images, (_TIMED_BATCH, *self.shape))
        whole = self._fused(self._lowered())
        with self._in_memory(whole) as low, self._in_memory(shipped) as high:
            lowered_ms, shipped_ms = medians_ms(
                lambda: low.infer(batch), lambda: high.infer(batch), rounds=_TIMED_ROUNDS
            )
        return RouterPrecision(
            route_agreement_lowered=lowered.parity.route_agreement,
            route_agreement=findings.parity.route_agreement,
            batch=_TIMED_BATCH,
            n=_TIMED_ROUNDS,
            lowered_ms=lowered_ms,
            shipped_ms=shipped_ms,
        )


def medians_ms(*calls: Callable[[], object], rounds: int) -> list[float]:
    """Return the median time of each call in ms, the calls taken in turn; a first round is free."""
    times = np.empty((rounds + 1, len(calls)))
    for turn in range(rounds + 1):
        for index, call in enumerate(calls):
            started = time.perf_counter()
            call()
            times[turn, index] = 1e3 * (time.perf_counter() - started)
    return [float(median) for median in np.median(times[1:], axis=0)]

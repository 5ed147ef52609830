"""Engine sets: a precision for each segment, what a backend makes of them, and its checks."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from onnx import ModelProto

from advmoe_deploy.bundle import EngineSet
from advmoe_deploy.export.cpu_backend import CpuBackend
from advmoe_deploy.export.precision.calibrate import calibrated
from advmoe_deploy.export.precision.gate import (
    Findings,
    GateLimits,
    attack_itself,
    precision_report,
    run_gate,
)
from advmoe_deploy.export.precision.search import PrecisionChoice, Precisions, choose_precisions
from advmoe_deploy.export.subject import Subject
from advmoe_deploy.export.targets import Target, fallback_order
from advmoe_deploy.export.tensorrt.backend import TensorRtBackend
from advmoe_deploy.progress import task
from advmoe_deploy.reports import Calibration, PrecisionReport, RouterPrecision
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.specs import Backend

_TIMED_BATCH = 64
_TIMED_ROUNDS = 10


class EngineBackend(Protocol):
    """Makes engines for one target; what :meth:`lower` returns is the backend's own form of them.

    ``symmetric`` int8 has zero points of 0; where it ``is_timed``, engines in memory are as fast as
    those that ship.
    """

    symmetric: bool
    is_timed: bool

    def can_lower(self, graph: ModelProto) -> bool:
        """Return whether a segment can run at the target's precision; int8 is not asked for."""

    def lower(self, graphs: Mapping[str, ModelProto], precisions: Precisions) -> Any:
        """Return the engines of segments, whose ``graphs`` are quantised already, in memory."""

    def open(self, lowered: Any) -> Sequence[Callable[[], Runner]]:
        """Return what opens the runner that is used, then what opens others that exist."""

    def write(self, lowered: Any, staged: Path) -> None:
        """Write the engines into the bundle under ``staged``."""

    def check(self, lowered: Any, staged: Path) -> Findings:
        """Return what the files answer as they lie there.

        Raises:
            CheckFailedError: that is not good enough.
        """

    def record(self, lowered: Any) -> dict[str, Any]:
        """Return the fields of :class:`EngineSet` that are the backend's own."""


_BACKENDS: dict[Backend, Callable[[Target, Subject], EngineBackend]] = {
    "onnxruntime": CpuBackend,
    "openvino": CpuBackend,
    "tensorrt": TensorRtBackend,
    "tensorrt-rtx": TensorRtBackend,
}


def write_engine_set(staged: Path, target: Target, subject: Subject) -> EngineSet:
    """Write the engines of ``target`` into the bundle under ``staged`` and return their record.

    Raises:
        BackendUnavailableError: engines are built where they run, and this is not such a machine.
        BundleError: the backend cannot read a graph.
        CheckFailedError: what lies there does not answer well enough.
    """
    limits = GateLimits(target.least_route_agreement)
    subject = replace(subject, gate=replace(subject.gate, limits=limits))
    return _Writer(target, subject, _BACKENDS[target.backend](target, subject)).write(staged)


class _Writer:
    def __init__(self, target: Target, subject: Subject, backend: EngineBackend) -> None:
        self.target, self.subject, self.backend = target, subject, backend
        self.quantised: Mapping[str, ModelProto] = {}
        self.calibration: Calibration | None = None
        if target.precision == "int8":
            self.quantised, self.calibration = calibrated(
                subject.reference.model,
                subject.parts,
                subject.labelled,
                subject.threat,
                symmetric=backend.symmetric,
                progress=subject.progress,
            )

    def write(self, staged: Path) -> EngineSet:
        """Choose the precision of each segment, write what runs, and check it as it lies there."""
        progress, name = self.subject.progress, f"{self.target.backend} {self.target.precision}"
        # One step: next to the choice, which attacks, the others take no time worth telling.
        with task(progress, name, 1):
            choice = self._choose() if self.target.precision != "fp32" else None
            precisions = choice.precisions if choice else self._lowest()
            lowered = self._lower(precisions)
            self.backend.write(lowered, staged)
            findings = self.backend.check(lowered, staged)
            progress.advance(name)
        return EngineSet(
            backend=self.target.backend,
            precision=self.target.precision,
            segments=precisions,
            parity=findings.parity,
            check=self._report(choice, findings, lowered),
            calibration=self.calibration,
            **self.backend.record(lowered),
        )

    def _lower(self, precisions: Precisions) -> Any:
        own = self.subject.parts.graphs
        graphs = {n: self.quantised[n] if p == "int8" else own[n] for n, p in precisions.items()}
        return self.backend.lower(graphs, precisions)

    def _lowest(self) -> Precisions:
        """Return the target's precision for every segment that has it."""
        wanted, graphs = self.target.precision, self.subject.parts.graphs

        def able(name: str) -> bool:
            if wanted == "int8":
                return name in self.quantised
            return self.backend.can_lower(graphs[name])

        return {name: wanted if able(name) else "fp32" for name in graphs}

    def _choose(self) -> PrecisionChoice:
        plan, steps = self.subject.parts.plan, fallback_order(self.target)
        return choose_precisions(plan, self._lowest(), steps, self._trial, self._quick_check)

    def _trial(self, precisions: Precisions) -> Findings:
        first, *others = self.backend.open(self._lower(precisions))
        with first() as runner:
            findings = run_gate(self.subject.gate, runner)
            for open_other in others:
                # Roundings differ a little between the forms, and each has to pass.
                if not findings.complaint:
                    with open_other() as other:
                        found = run_gate(self.subject.gate, other)
                    findings = found if found.complaint else findings
            if findings.complaint:
                return findings
            # Last, for it takes longest.
            return attack_itself(self.subject.gate, runner, findings)

    def _quick_check(self, precisions: Precisions) -> Findings:
        with self.backend.open(self._lower(precisions))[0]() as runner:
            return run_gate(self.subject.gate, runner)

    def _report(
        self, choice: PrecisionChoice | None, findings: Findings, lowered: Any
    ) -> PrecisionReport | None:
        """Return what was measured as the choice was made: an attack takes too long to repeat."""
        if self.target.is_exact:
            return None
        if choice is None:
            return precision_report(self.subject.gate, {}, findings)
        router = self._router_cost(choice, lowered) if self.backend.is_timed else None
        return precision_report(self.subject.gate, choice.raised, choice.findings, router)

    def _router_cost(self, choice: PrecisionChoice, shipped: Any) -> RouterPrecision | None:
        """Return what it costs that routers stayed in fp32, if so: times of both, in turn."""
        if choice.lowered is None:
            return None
        images = self.subject.gate.parity.images
        batch = np.resize(images, (_TIMED_BATCH, *images.shape[1:]))
        open_low, open_high = (
            self.backend.open(each)[0] for each in (self._lower(self._lowest()), shipped)
        )
        with open_low() as low, open_high() as high:
            lowered_ms, shipped_ms = medians_ms(
                lambda: low.infer(batch), lambda: high.infer(batch), rounds=_TIMED_ROUNDS
            )
        return RouterPrecision(
            route_agreement_lowered=choice.lowered.parity.route_agreement,
            route_agreement=choice.findings.parity.route_agreement,
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

"""Gate: whether a bundle is still as accurate and as robust as a baseline that was kept.

The examples that broke the baseline are replayed first; then the bundle is attacked afresh. An
image stands only if it withstands both.

Shapes: N images, C channels, H height, W width.
"""

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from advmoe_deploy.bundle import REFERENCE, Bundle
from advmoe_deploy.parity.answers import Flags
from advmoe_deploy.parity.compare import is_right, predictions_of
from advmoe_deploy.parity.drop import Drop
from advmoe_deploy.parity.intervals import wilson_interval
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.reports.drops import Verdict, worst_of
from advmoe_deploy.runtime.select import engine_for, open_runner
from advmoe_deploy.specs import Frozen
from advmoe_deploy.verify.examples.baseline import Baseline
from advmoe_deploy.verify.examples.images import images_of, source_of
from advmoe_deploy.verify.examples.stored import StoredExamples, read_examples
from advmoe_deploy.verify.report import AttackOutcome, RobustReport
from advmoe_deploy.verify.suites import Suite
from advmoe_deploy.verify.verify import verify_bundle

# The weakest first.
_SUITES: tuple[Suite, ...] = ("quick", "standard", "full")


class Check(Frozen):
    """One question to the bundle, its answer, and a line with the numbers."""

    name: str
    verdict: Verdict
    message: str
    seconds: float


class GateReport(Frozen):
    """Results of all checks; ``paired`` says that images were compared one by one."""

    verdict: Verdict
    bundle: str
    baseline: str
    engine: str
    images: int
    max_drop: float
    paired: bool
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    report: RobustReport
    seconds: float


@dataclass(frozen=True)
class Conditions:
    """Conditions of a check; see :func:`~advmoe_deploy.verify.verify.verify_bundle`."""

    engine: str | None = None
    data: str | None = None
    class_map: Mapping[str, str] | None = None
    attacks: Suite = "quick"
    max_drop: float = 2.0
    threads: int = 0
    allow_fragile: bool = False


@dataclass(frozen=True)
class _Fresh:
    """The bundle under attack: its report, and who stands of each image."""

    report: RobustReport
    examples: StoredExamples
    replayed_N: Flags
    same: bool


def gate_bundle(
    bundle: Bundle,
    baseline: Baseline,
    how: Conditions,
    *,
    measured: list[AttackOutcome] | None = None,
    progress: Progress | None = None,
) -> GateReport:
    """Return whether ``bundle`` lost more than ``how.max_drop`` points against ``baseline``.

    Both are asked about the same first test images, within the baseline's epsilon.

    Raises:
        BundleError: the bundle holds no reference weights.
        DataError: the baseline's examples are not of these test images.
        UsageError: the data do not fit the model.
    """
    started = time.perf_counter()
    engine = engine_for(bundle, how.engine, (progress or Silent()).note)
    how = replace(how, engine=engine)
    replayed_N = _replay(bundle, baseline, how)
    replay_seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory(prefix="advmoe-gate-") as folder:
        file = Path(folder) / "fresh.npz"
        report = verify_bundle(
            bundle,
            engine=how.engine,
            data=how.data,
            class_map=how.class_map,
            attacks=how.attacks,
            images=baseline.images,
            epsilon=baseline.epsilon,
            threads=how.threads,
            allow_fragile=how.allow_fragile,
            measured=measured,
            examples=file,
            progress=progress,
        )
        examples = read_examples(file)
    if replayed_N is None:
        replayed_N = np.ones(report.images, dtype=bool)
    fresh = _Fresh(report, examples, replayed_N, _same_function(bundle, baseline, examples))
    checks = _checks(baseline, fresh, how.max_drop, replay_seconds)
    return GateReport(
        verdict=worst_of([check.verdict for check in checks]),
        bundle=bundle.path.resolve().name,
        baseline=baseline.name,
        engine=engine,
        images=report.images,
        max_drop=how.max_drop,
        paired=baseline.examples is not None,
        checks=checks,
        notes=_notes(baseline, how.attacks, report),
        report=report,
        seconds=time.perf_counter() - started,
    )


def _replay(bundle: Bundle, baseline: Baseline, how: Conditions) -> Flags | None:
    """Return which of the baseline's examples [N] the bundle's engine is right about."""
    stored = baseline.examples
    if stored is None:
        return None
    source = source_of(bundle, how.data)
    x_NCHW, labels_N = images_of(bundle, source, len(stored.labels_N), how.class_map)
    stored.require_of(x_NCHW, labels_N, baseline.path)
    with open_runner(bundle, how.engine, threads=how.threads) as runner:
        return is_right(predictions_of(runner, stored.images_NCHW).logits, labels_N)


def _same_function(bundle: Bundle, baseline: Baseline, examples: StoredExamples) -> bool:
    """Return whether both engines were shown to be one and the same torch model."""
    stored = baseline.examples
    if stored is None or stored.header.model != bundle.manifest.files[REFERENCE].sha256:
        return False
    return stored.header.same_function and examples.header.same_function


def _checks(
    baseline: Baseline, fresh: _Fresh, max_drop: float, replay_seconds: float
) -> tuple[Check, ...]:
    report, stored = fresh.report, baseline.examples
    clean_N = fresh.examples.clean.engine_N
    stands_N = fresh.examples.standing.engine_N & fresh.replayed_N
    clean, robust = "clean accuracy", "robust accuracy"
    if stored is None:
        accuracies = [
            _unpaired(clean, baseline, baseline.clean, clean_N, max_drop, 0.0),
            _unpaired(robust, baseline, baseline.robust, stands_N, max_drop, report.seconds),
        ]
    else:
        before, after = stored.standing.engine_N, fresh.replayed_N
        pairs = [
            ("replayed examples", before, after, replay_seconds),
            (clean, stored.clean.engine_N, clean_N, 0.0),
            (robust, before, stands_N, report.seconds),
        ]
        accuracies = [
            _paired(name, Drop.between(then_N, now_N), max_drop, seconds, counted=fresh.same)
            for name, then_N, now_N, seconds in pairs
        ]
    return (*accuracies, _consistency(report), _export(report))


def _paired(name: str, drop: Drop, max_drop: float, seconds: float, *, counted: bool) -> Check:
    if not counted:
        judged = drop.report(max_drop)
        return Check(name=name, verdict=judged.verdict, message=str(judged), seconds=seconds)
    # The same function: there is no population to conclude on, and images are simply counted.
    verdict: Verdict = "passed" if drop.points <= max_drop else "failed"
    message = f"a drop of {drop.points:.2f} points on {drop.images:,} images of the same model"
    message += f"; {verdict} (limit {max_drop:g} points)"
    return Check(name=name, verdict=verdict, message=message, seconds=seconds)


def _unpaired(
    name: str, baseline: Baseline, then: float, now_N: Flags, max_drop: float, seconds: float
) -> Check:
    """Return whether the share fell, by Newcombe's interval of two independent shares.

    Source: R. G. Newcombe, Statistics in Medicine 17 (1998), method 10.
    """
    images = len(now_N)
    now = int(now_N.sum())
    low, high = wilson_interval(now, images)
    first_low, first_high = then, then
    if baseline.images is not None:
        first_low, first_high = wilson_interval(round(then * baseline.images), baseline.images)
    drop = then - now / images
    least = 100 * (drop - math.hypot(then - first_low, high - now / images))
    most = 100 * (drop + math.hypot(first_high - then, now / images - low))
    verdict: Verdict = "passed" if most <= max_drop else "undecided"
    verdict = "failed" if least > max_drop else verdict
    message = (
        f"{100 * then:.2f} % before, {100 * now / images:.2f} % now: a drop of {100 * drop:.2f} "
        f"points ({least:.2f} to {most:.2f}, 95 % interval, unpaired) on {images:,} images; "
        f"{verdict} (limit {max_drop:g} points)"
    )
    return Check(name=name, verdict=verdict, message=message, seconds=seconds)


def _consistency(report: RobustReport) -> Check:
    found = "; ".join(f"{finding.kind}: {finding.message}" for finding in report.findings)
    return Check(
        name="engine answers as its reference",
        verdict="failed" if found else "passed",
        message=found or f"no finding on {report.consistency.images:,} images",
        seconds=report.consistency.seconds,
    )


def _export(report: RobustReport) -> Check:
    counted = report.consistency.same_function
    lost = (
        f"{name} accuracy: {drop.counted() if counted else drop.sentence()}"
        for name, drop in (("clean", report.clean_drop), ("robust", report.robust_drop))
    )
    return Check(
        name="robustness survived the export",
        verdict=report.verdict,
        message="; ".join([*report.fragility, *lost]),
        seconds=0.0,
    )


def _notes(baseline: Baseline, attacks: Suite, report: RobustReport) -> tuple[str, ...]:
    notes = [baseline.note] if baseline.note else []
    if baseline.suite is not None and _SUITES.index(attacks) < _SUITES.index(baseline.suite):
        notes.append(
            f"the baseline met the suite {baseline.suite}, this bundle {attacks}: a new model may "
            f"look more robust than it is; pass --attacks {baseline.suite}"
        )
    return (*notes, *report.warnings)

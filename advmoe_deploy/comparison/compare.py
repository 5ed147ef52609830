"""Comparison of all engines and precisions of a bundle, in one process and on the same images."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.bundle import MODEL, Bundle
from advmoe_deploy.comparison.report import Aim, BenchmarkReport, Contender, MeasuredShare, Timing
from advmoe_deploy.data.matching import Trained, matching_test_images
from advmoe_deploy.data.registry import absolute
from advmoe_deploy.errors import (
    AdvMoEError,
    BackendUnavailableError,
    BundleError,
    UsageError,
    unknown_name,
)
from advmoe_deploy.parity.answers import Images
from advmoe_deploy.parity.compare import is_right, predictions_of
from advmoe_deploy.parity.intervals import wilson_interval
from advmoe_deploy.profiling.profile import profile_bundle
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.reports import LatencyRatio, LatencyRow, ProfiledModel
from advmoe_deploy.reports.devices import GpuLibrary
from advmoe_deploy.runtime.select import backend_of, open_runner, parse_engine
from advmoe_deploy.runtime.tensorrt.load import graph_files
from advmoe_deploy.specs import Precision

if TYPE_CHECKING:
    from advmoe_deploy.verify.suites import Suite

_DENSE = "baselines/dense.onnx"
# Seconds of measuring per batch size.
_BUDGET_S = 3.0


@dataclass(frozen=True)
class _Labelled:
    """Test images [N, C, H, W] with their labels, and what they are of."""

    source: str
    x_NCHW: Images
    labels_N: NDArray[np.int64]


def benchmark_bundle(
    bundle: Bundle,
    *,
    aim: Aim = "latency",
    data: str | None = None,
    class_map: Mapping[str, str] | None = None,
    images: int = 500,
    attacks: Suite | None = None,
    batches: Sequence[int] = (1, 8, 64),
    threads: int = 2,
    measured: list[Contender] | None = None,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Return size, accuracy and time of every engine and precision that ``bundle`` can run here.

    Args:
        bundle: an opened bundle.
        aim: what to mark the best for.
        data: a data source, of which the test images are used; by default the one the model was
            trained on, and no clean accuracy, with a note, where that cannot be read.
        class_map: the model's name of classes that ``data`` calls otherwise.
        images: how many test images, at most.
        attacks: a suite to attack each engine by; without one, robust accuracy is what the export
            recorded, where it did.
        batches: batch sizes to time.
        threads: of the engines.
        measured: filled with each engine as its accuracy is known, and with their times as far as
            they are if the timing fails, where a list is given.
        progress: who listens.

    Raises:
        UsageError: the aim or a size makes no sense, or ``data`` do not fit the model.
        DataError: ``data`` cannot be read.
        BundleError: attacks are asked for, and the bundle holds no reference weights.
        BackendUnavailableError: no engine of the bundle can run here.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    if aim not in get_args(Aim):
        raise unknown_name("aim", aim, get_args(Aim))
    notes: list[str] = []
    labelled = _labelled(bundle, data, class_map, images, notes)
    if attacks is not None and labelled is None:
        raise UsageError(f"attacks need labelled images: {notes[0]}")
    names, left_out = _engines(bundle)
    found = measured if measured is not None else []
    with task(progress, "accuracy", len(names)):
        for name in names:
            try:
                clean = _clean(bundle, name, labelled, threads)
            except BackendUnavailableError as error:
                left_out.append(f"{name}: {error}")
                continue
            found.append(_contender(bundle, name, clean))
            if attacks is not None and labelled is not None:
                robust = _attacked(bundle, name, labelled, class_map, attacks, threads, progress)
                found[-1] = found[-1].model_copy(update={"robust": robust})
            progress.advance("accuracy")
    if not found:
        raise BackendUnavailableError(f"no engine of {bundle.path} runs here: {left_out[0]}")
    rows: list[LatencyRow] = []
    try:
        latency = profile_bundle(
            bundle,
            engines=[each.name for each in found],
            batches=batches,
            against=("dense",),
            threads=threads,
            budget_s=_BUDGET_S,
            measured=rows,
            progress=progress,
        )
    except BaseException:
        found[:] = _timed(bundle, found, rows, ())
        raise
    return BenchmarkReport(
        bundle=str(bundle.path),
        aim=aim,
        data=labelled.source if labelled else None,
        contenders=_with_best(_timed(bundle, found, latency.rows, latency.ratios), aim),
        left_out=tuple(left_out),
        notes=tuple(notes),
        latency=latency,
        seconds=time.perf_counter() - started,
    )


def _labelled(
    bundle: Bundle,
    data: str | None,
    class_map: Mapping[str, str] | None,
    images: int,
    notes: list[str],
) -> _Labelled | None:
    """Return test images; where nobody named ``data`` and there are none, ``notes`` says why."""
    manifest = bundle.manifest
    try:
        source = absolute(data or manifest.data, manifest.model.image_size)
        found = matching_test_images(source, Trained.of(manifest), images, class_map=class_map)
    except AdvMoEError as error:
        if data is not None or class_map or images < 1:
            raise
        notes.append(f"clean accuracy is unmeasured: {error}")
        return None
    return _Labelled(source, *found)


def _engines(bundle: Bundle) -> tuple[list[str], list[str]]:
    """Return what ``--engine`` calls each, and of those that cannot run yet why."""
    sets = bundle.manifest.engines
    names = dict.fromkeys(["onnxruntime:fp32", *(each.name for each in sets if each.is_built)])
    waiting = [f"{each.name}: its engines are not built yet" for each in sets if not each.is_built]
    return [*names], waiting


def _clean(
    bundle: Bundle, engine: str, labelled: _Labelled | None, threads: int
) -> MeasuredShare | None:
    """Return the clean accuracy of ``engine``, which is opened whether or not there are images."""
    with open_runner(bundle, engine, threads=threads) as runner:
        if labelled is None:
            return None
        answer = predictions_of(runner, labelled.x_NCHW)
    right = int(is_right(answer.logits, labelled.labels_N).sum())
    return _share(right, len(labelled.labels_N), f"test images of {labelled.source}")


def _share(hits: int, images: int, source: str) -> MeasuredShare:
    interval = wilson_interval(hits, images)
    return MeasuredShare(share=hits / images, interval=interval, images=images, source=source)


def _recorded(bundle: Bundle, engine: str) -> MeasuredShare | None:
    """Return what the export recorded: of a lower precision itself, of fp32 as torch's."""
    name, precision = parse_engine(engine)
    own = bundle.engine_set(backend_of(name), precision or "fp32")
    checks = [each.check for each in bundle.manifest.engines if each.check is not None]
    check = own.check if own and own.check else next(iter(checks), None)
    if check is None or check.robust_accuracy is None or check.attack is None:
        return None
    exact = own is None or own.check is None
    pair, images = check.robust_accuracy, check.holdout_images
    share = pair.reference if exact else pair.engine
    how = f"{check.attack.name}-{check.attack.steps}{', on the torch model' if exact else ''}"
    source = f"hold-out images of {check.data}, at the export: {how}"
    return _share(round(share * images), images, source)


def _attacked(
    bundle: Bundle,
    engine: str,
    labelled: _Labelled,
    class_map: Mapping[str, str] | None,
    attacks: Suite,
    threads: int,
    progress: Progress,
) -> MeasuredShare:
    from advmoe_deploy.verify.verify import verify_bundle  # which needs torch

    report = verify_bundle(
        bundle,
        engine=engine,
        data=labelled.source,
        class_map=class_map,
        attacks=attacks,
        images=len(labelled.labels_N),
        threads=threads,
        progress=progress,
    )
    return MeasuredShare(
        share=report.robust_accuracy.engine,
        interval=report.robust_interval,
        images=report.images,
        source=f"test images of {labelled.source}, --attacks {attacks}",
    )


def _contender(bundle: Bundle, key: str, clean: MeasuredShare | None) -> Contender:
    """Return one engine, neither attacked nor timed yet."""
    name, precision = parse_engine(key)
    return Contender(
        model="own",
        engine=name,
        precision=precision or "fp32",
        bytes=_bytes(bundle, name, precision or "fp32"),
        clean=clean,
        robust=_recorded(bundle, key),
        timings=(),
    )


def _timed(
    bundle: Bundle,
    found: Sequence[Contender],
    rows: Sequence[LatencyRow],
    ratios: Sequence[LatencyRatio],
) -> list[Contender]:
    """Return the engines ``found`` and the dense network, where the bundle has one, with times."""
    contenders = [*found]
    own: ProfiledModel = "moe" if bundle.manifest.plan.routes else "dense"
    if own == "moe" and bundle.has(_DENSE):
        dense = Contender(
            model="dense",
            engine="onnxruntime",
            precision="fp32",
            bytes=bundle.manifest.files[_DENSE].bytes,
            clean=None,
            robust=None,
            timings=(),
        )
        contenders.append(dense)
    called: dict[str, ProfiledModel] = {"own": own, "dense": "dense"}
    return [
        each.model_copy(update={"timings": _timings(each, called[each.model], rows, ratios)})
        for each in contenders
    ]


def _bytes(bundle: Bundle, engine: str, precision: Precision) -> int:
    """Return the size of the files that are loaded."""
    files = {MODEL}
    chosen = bundle.engine_set(backend_of(engine), precision)
    if chosen is None and (engine, precision) != ("onnxruntime", "fp32"):
        raise BundleError(f"{bundle.path} has no {engine}:{precision}; export it again")
    if chosen is not None:
        on_gpu = chosen.backend in get_args(GpuLibrary)
        segments = {segment.file for segment in chosen.plan.segments}
        files = {*graph_files(chosen.plan).values()} if on_gpu else segments
    return sum(bundle.manifest.files[name].bytes for name in files)


def _timings(
    each: Contender,
    model: ProfiledModel,
    rows: Sequence[LatencyRow],
    ratios: Sequence[LatencyRatio],
) -> tuple[Timing, ...]:
    """Return the times of ``each``, which ``rows`` call ``model``."""
    own = (each.engine, each.precision)
    dense = {
        ratio.batch: ratio.ratio
        for ratio in ratios
        if ratio.a == "dense" and (ratio.engine, ratio.precision) == own and model != "dense"
    }

    def timing(row: LatencyRow) -> Timing:
        return Timing(
            batch=row.batch,
            p50_ms=row.p50_ms,
            images_per_s=row.images_per_s,
            dense_ratio=dense.get(row.batch),
        )

    return tuple(
        timing(row) for row in rows if row.model == model and (row.engine, row.precision) == own
    )


def _with_best(contenders: Sequence[Contender], aim: Aim) -> tuple[Contender, ...]:
    def cost(each: Contender) -> float:
        if aim == "size":
            return each.bytes
        if aim == "throughput":
            return -max(timing.images_per_s for timing in each.timings)
        return min(each.timings, key=lambda timing: timing.batch).p50_ms

    best = min((each for each in contenders if each.model == "own"), key=cost)
    return tuple(
        each.model_copy(update={"best": True}) if each is best else each for each in contenders
    )

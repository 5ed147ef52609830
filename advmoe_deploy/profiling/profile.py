"""Latency of a bundle next to its baselines, in one process and on the same images."""

import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy import __version__
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import UsageError, unknown_name
from advmoe_deploy.parity.answers import Images
from advmoe_deploy.plan import RouteStep
from advmoe_deploy.profiling.baselines import BASELINES
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.profiling.timing import ratio_of_medians, time_interleaved
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.reports import LatencyRatio, LatencyReport, LatencyRow, ProfiledModel
from advmoe_deploy.reports.cautions import of_costs, of_latency
from advmoe_deploy.reports.devices import GpuLibrary
from advmoe_deploy.runtime.onnxruntime.engine import onnxruntime_version
from advmoe_deploy.runtime.onnxruntime.graph_runner import GraphRunner
from advmoe_deploy.runtime.openvino.engine import openvino_version
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.select import ON_GPU, backend_of, engine_for, open_runner, parse_engine
from advmoe_deploy.runtime.tensorrt.api import version_text
from advmoe_deploy.runtime.tensorrt.cuda import gpu
from advmoe_deploy.sealing.files import Sealed
from advmoe_deploy.sealing.golden import golden_arrays

Seconds = NDArray[np.float64]
_LARGEST_BATCH = 4096


@dataclass(frozen=True)
class _Subject:
    """One model on one engine."""

    model: ProfiledModel
    engine: str
    runner: Runner
    macs: int

    @property
    def device(self) -> str:
        """Device that it runs on."""
        return f"gpu ({gpu().name})" if self.engine in ON_GPU else f"cpu ({processor_name()})"

    @property
    def key(self) -> str:
        return f"{self.model} {self.engine} {self.runner.precision}"


@dataclass(frozen=True)
class _Timings:
    """Seconds per round of every subject at one batch size."""

    batch: int
    seconds: Mapping[str, Seconds]
    warmup: int
    threads: int


def profile_bundle(
    bundle: Bundle,
    *,
    engines: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8, 64),
    against: Sequence[str] = BASELINES,
    threads: int = 2,
    n: int | None = None,
    warmup: int = 3,
    budget_s: float = 10.0,
    samples: dict[str, list[float]] | None = None,
    measured: list[LatencyRow] | None = None,
    progress: Progress | None = None,
) -> LatencyReport:
    """Return latencies of the bundle's model and of its baselines, interleaved in one process.

    Args:
        bundle: an opened bundle. Its golden images are repeated up to the batch size, so that
            images are routed as real ones are.
        engines: as ``open_runner`` takes them, by default what the bundle was made for; baselines
            run as fp32 graphs on ONNX Runtime.
        batches: batch sizes.
        against: baselines; one that the bundle lacks is left out, and ``settings`` says so.
        threads: inside one operator.
        n: rounds per batch size; by default as many as ``budget_s`` allows, at least 30.
        warmup: rounds that are not counted.
        budget_s: seconds of measuring per batch size.
        samples: filled with every single time in milliseconds, where one is given.
        measured: filled with the rows of each batch size as it ends, where a list is given.
        progress: who listens.

    Raises:
        UsageError: an engine, a baseline, a batch size or a count makes no sense.
    """
    progress = progress or Silent()
    engines = engines if engines is not None else [engine_for(bundle, None, progress.note)]
    _check_request(engines, batches, against, threads, n, warmup)
    images, ids = _golden(bundle)
    rows = measured if measured is not None else []
    ratios: list[LatencyRatio] = []
    settings: dict[str, str | int | float | bool] = {
        "spinning": False,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "the library's default"),
        "threads": threads,
        "images": "golden.npz, repeated to the batch size",
        "order": "interleaved, shuffled in every round",
        "timed": "infer: input check, engine, outputs",
        "advmoe_deploy": __version__,
    }
    with ExitStack() as stack, task(progress, "profile", len({*batches})):
        subjects = _open_subjects(stack, bundle, engines, against, threads, settings)
        for form in {s.runner.custom_ops for s in subjects if isinstance(s.runner, GraphRunner)}:
            if form:
                settings["custom_ops"] = str(form)
        if rounded := [s.key for s in subjects if s.runner.tf32]:
            settings["rounded_to_tf32"] = ", ".join(rounded)
        for batch in dict.fromkeys(batches):
            repeated = np.resize(images, (batch, *images.shape[1:]))
            seconds = time_interleaved(
                {s.key: partial(s.runner.infer, repeated) for s in subjects},
                rounds=n,
                warmup=warmup,
                budget_s=budget_s,
                progress=progress,
                name=f"batch {batch}",
            )
            if samples is not None:
                samples |= {f"{k}, batch {batch}": (1e3 * v).tolist() for k, v in seconds.items()}
            timings = _Timings(batch, seconds, warmup, threads)
            rows += [_row(s, timings) for s in subjects]
            ratios += _ratios(subjects, timings)
            for route in bundle.manifest.plan.routes:
                load = _load(route, ids[route.layer], batch)
                settings[f"{route.layer}.expert_load_{batch}"] = load
            progress.advance("profile")
    return LatencyReport(
        rows=tuple(rows),
        ratios=tuple(ratios),
        versions=_versions(engines),
        settings=settings,
        warnings=(*of_costs(bundle.manifest.macs), *of_latency(ratios)),
    )


def _check_request(
    engines: Sequence[str],
    batches: Sequence[int],
    against: Sequence[str],
    threads: int,
    n: int | None,
    warmup: int,
) -> None:
    for engine in engines:
        parse_engine(engine)
    for name in against:
        if name not in BASELINES:
            raise unknown_name("baseline", name, BASELINES)
    if not engines or not batches:
        raise UsageError("nothing to time; name at least one engine and one batch size")
    for batch in batches:
        if not 1 <= batch <= _LARGEST_BATCH:
            raise UsageError(f"batch={batch} is outside 1..{_LARGEST_BATCH}; choose another")
    for name, value, least in (("threads", threads, 0), ("n", n, 2), ("warmup", warmup, 1)):
        if value is not None and value < least:
            raise UsageError(f"{name}={value} is too small; the least is {least}")


def _golden(bundle: Bundle) -> tuple[Images, dict[str, NDArray[np.int64]]]:
    """Return the golden images and where each layer sends them."""
    layers = [route.layer for route in bundle.manifest.plan.routes]
    golden = golden_arrays(bundle)
    return golden["images"], {layer: golden[f"{layer}.expert_ids"] for layer in layers}


def _open_subjects(
    stack: ExitStack,
    bundle: Bundle,
    engines: Sequence[str],
    against: Sequence[str],
    threads: int,
    settings: dict[str, str | int | float | bool],
) -> list[_Subject]:
    manifest = bundle.manifest
    macs = manifest.macs
    own: ProfiledModel = "moe" if manifest.plan.routes else "dense"
    subjects: list[_Subject] = []
    for engine in engines:
        runner = stack.enter_context(open_runner(bundle, engine, threads=threads))
        subject = _Subject(own, runner.name, runner, macs.executed)
        if subject.key in [other.key for other in subjects]:
            raise UsageError(f"{', '.join(engines)} names {subject.key} twice; name each once")
        subjects.append(subject)
        for precision, names in _raised(bundle, runner).items():
            settings[f"{runner.name} {runner.precision}, in {precision}"] = ", ".join(names)
    cost = {"dense": macs.dense, "s-dense": macs.s_dense, "unfused": macs.unfused}
    left_out = []
    for name in (name for name in BASELINES if name in against):
        file = f"baselines/{name}.onnx"
        if not bundle.has(file):
            left_out.append(name)
            continue
        baseline = stack.enter_context(_baseline(bundle, bundle.graph(file), name, threads))
        subjects.append(_Subject(name, "onnxruntime", baseline, cost[name]))
    if left_out:
        settings["left_out"] = f"{', '.join(left_out)}: the bundle has no such graph"
    return subjects


def _raised(bundle: Bundle, runner: Runner) -> dict[str, list[str]]:
    """Return by precision the segments that ``runner`` runs in a higher one than its own."""
    engines = bundle.engine_set(backend_of(runner.name), runner.precision)
    segments = engines.segments if engines else {}
    raised: dict[str, list[str]] = {}
    for name, precision in segments.items():
        if precision != runner.precision:
            raised.setdefault(precision, []).append(name)
    return raised


def _baseline(bundle: Bundle, file: Sealed, name: str, threads: int) -> GraphRunner:
    manifest = bundle.manifest
    routes = manifest.plan.routes if name == "unfused" else ()
    return GraphRunner(file, manifest.model.image_shape, routes=routes, threads=threads)


def _row(subject: _Subject, timings: _Timings) -> LatencyRow:
    milliseconds = 1e3 * timings.seconds[subject.key]
    p50, p90, p99 = (float(p) for p in np.percentile(milliseconds, [50, 90, 99]))
    return LatencyRow(
        model=subject.model,
        engine=subject.engine,
        precision=subject.runner.precision,
        batch=timings.batch,
        threads=timings.threads,
        device=subject.device,
        n=len(milliseconds),
        warmup=timings.warmup,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        images_per_s=1e3 * timings.batch / p50,
        macs=subject.macs,
    )


def _ratios(subjects: Sequence[_Subject], timings: _Timings) -> list[LatencyRatio]:
    """Return every baseline over the model, on each engine the model ran on."""
    models = [s for s in subjects if s.model == "moe"]
    baselines = [s for s in subjects if s.model != "moe"]
    ratios = []
    for model in models:
        for baseline in baselines:
            ratio = ratio_of_medians(timings.seconds[baseline.key], timings.seconds[model.key])
            ratios.append(
                LatencyRatio(
                    a=baseline.model,
                    a_engine=baseline.engine,
                    a_precision=baseline.runner.precision,
                    b="moe",
                    batch=timings.batch,
                    engine=model.engine,
                    precision=model.runner.precision,
                    ratio=ratio.value,
                    ci_low=ratio.low,
                    ci_high=ratio.high,
                )
            )
    return ratios


def _load(route: RouteStep, ids: NDArray[np.int64], batch: int) -> str:
    repeated = np.resize(ids, (batch, *ids.shape[1:])).reshape(-1)
    return ",".join(map(str, np.bincount(repeated, minlength=route.num_experts)))


def _versions(engines: Sequence[str]) -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": onnxruntime_version(),
    }
    if any(engine.startswith("openvino") for engine in engines):
        versions["openvino"] = openvino_version()
    names = {parse_engine(engine)[0] for engine in engines}
    versions |= {lib: version_text(lib) for lib in get_args(GpuLibrary) if lib in names}
    if names & {*ON_GPU}:
        versions["driver"] = gpu().driver
    return versions

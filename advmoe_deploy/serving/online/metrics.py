"""Figures of a running server in Prometheus' format; every label has few values, all known before.

With ``prometheus_client``, known to this module alone.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from advmoe_deploy.runtime.routing import share_margins
from advmoe_deploy.runtime.runner import joined
from advmoe_deploy.serving.online.job import Done, Times
from advmoe_deploy.serving.online.operations.monitor import CLASSES, Drift, Monitor

STAGES = ("read", "decode", "wait", "write", "all")
_TOTALS = ("success_count", "success", "fail_count", "fail", "read", "wait", "compute", "write")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_MARGINS = tuple(i / 10 for i in range(1, 11))
# After so many rows the weight of those before has fallen to 1/e in the entropy of loads.
_WINDOW = 1000.0
# Batches of so many images are counted together: of one image each, it would cost half its time.
_TOGETHER = 256


class Metrics:
    """Counters and times of one model since it was loaded."""

    def __init__(
        self, gauges: Callable[[], dict[str, float]], monitor: Monitor | None = None
    ) -> None:
        """Begin with nothing; ``gauges`` are asked for whenever somebody reads the figures."""
        self._monitor = monitor
        self._registry = CollectorRegistry()
        self._gauges = gauges
        self._lock = threading.Lock()
        self._fresh: list[Done] = []
        self._fresh_images = 0
        self._loads: dict[str, NDArray[np.float64]] = {}
        self._totals = dict.fromkeys(_TOTALS, 0.0)
        self.last_s = 0.0  # when the last batch ended, since the epoch
        own: dict[str, Any] = {"registry": self._registry, "namespace": "advmoe"}
        requests = Counter("requests", "Inference requests.", ["status"], **own)
        self._ended = cache(lambda status: requests.labels(str(status)))  # statuses are few
        self._seconds = Histogram(
            "request_seconds",
            "Time of a request: read (body and its numbers), decode (an image file), wait (in the "
            "queue), write (the answer's text), all.",
            ["stage"],
            buckets=_SECONDS,
            **own,
        )
        self._compute = Histogram("batch_seconds", "Time of a batch.", buckets=_SECONDS, **own)
        self._batches = Histogram("batch_images", "Images of a batch.", buckets=_IMAGES, **own)
        self._experts = Counter(
            "expert_rows", "Images or tokens sent to an expert.", ["layer", "expert"], **own
        )
        self._margins = Margins()
        self._registry.register(self._margins)
        self._stages = {name: self._seconds.labels(name) for name in STAGES}
        self._registry.register(_Now(self))

    def request(self, status: int, seconds: float, times: Times) -> None:
        """Count a request that ended with ``status``; its ``times``, if it was answered."""
        self._ended(status).inc()
        self._stages["all"].observe(seconds)
        end = "success" if status == 200 else "fail"
        self._totals[f"{end}_count"] += 1
        self._totals[end] += seconds
        if status != 200:
            return
        for stage in ("read", "wait", "write", *["decode"] * (times.decode > 0)):
            self._stages[stage].observe(getattr(times, stage))
        self._totals["read"] += times.read + times.decode
        self._totals["wait"] += times.wait
        self._totals["compute"] += times.compute
        self._totals["write"] += times.write

    def warm_up(self, done: Done) -> None:
        """Show the experts of a batch that is no request's, at what they have."""
        for layer, ids in done.answer.expert_ids.items():
            for expert in np.unique(ids):
                self._experts.labels(layer, str(expert))

    def batch(self, done: Done) -> None:
        """Count a batch, its routes and margins."""
        self.last_s = time.time()
        with self._lock:
            self._fresh.append(done)
            self._fresh_images += len(done.answer.logits)
            many = self._fresh_images >= _TOGETHER
        if many:
            self._count_batches()

    def totals(self) -> dict[str, float]:
        """Return counts and sums of times: of ``success`` and ``fail``, of the parts of the former.

        ``images`` and ``batches`` are of all that was computed.
        """
        self._count_batches()
        (batches,) = self._batches.collect()
        found = {sample.name.rpartition("_")[2]: sample.value for sample in batches.samples}
        return {**self._totals, "images": found["sum"], "batches": found["count"]}

    def families(self) -> list[Metric]:
        """Return everything, as it is now."""
        self._count_batches()
        return list(self._registry.collect())

    def now(self) -> dict[str, float]:
        """Return what there is at this moment."""
        return self._gauges()

    def entropies(self) -> dict[str, float]:
        """Return by layer the entropy, in bits, of the recent loads of its experts."""
        result = {}
        with self._lock:
            loads = dict(self._loads)
        for layer, loads_E in loads.items():
            shares_E = loads_E[loads_E > 0] / loads_E.sum()
            result[layer] = float(-(shares_E * np.log2(shares_E)).sum())
        return result

    def monitored(self) -> tuple[list[Drift], int]:
        """Return the drifts of the monitor's last whole window, and how many there were."""
        with self._lock:
            return (
                ([], 0) if self._monitor is None else (self._monitor.drifts, self._monitor.windows)
            )

    def _count_batches(self) -> None:
        with self._lock:
            fresh, self._fresh, self._fresh_images = self._fresh, [], 0
            for done in fresh:  # with the lock: who asks meanwhile must not miss them
                self._compute.observe(done.seconds)
                self._batches.observe(len(done.answer.logits))
        if not fresh:
            return
        answers = joined([done.answer for done in fresh])
        loads = {layer: np.bincount(ids.reshape(-1)) for layer, ids in answers.expert_ids.items()}
        margins = {**answers.margins, CLASSES: share_margins(answers.logits)}
        found = {layer: binned(values) for layer, values in margins.items()}
        with self._lock:  # for which the event loop may wait
            for layer, loads_E in loads.items():
                self._routes(layer, loads_E.astype(np.float64))
            for layer, (counts_B, total) in found.items():
                self._margins.add(layer, counts_B, total)
            if self._monitor is not None:
                self._monitor.add(len(answers.logits), answers.expert_ids, margins)

    def _routes(self, layer: str, loads_E: NDArray[np.float64]) -> None:
        for expert in np.flatnonzero(loads_E):
            self._experts.labels(layer, str(expert)).inc(loads_E[expert])
        before_E = self._loads.get(layer, np.zeros(0))
        size = max(len(before_E), len(loads_E))
        before_E, loads_E = (np.pad(each, (0, size - len(each))) for each in (before_E, loads_E))
        self._loads[layer] = before_E * np.exp(-loads_E.sum() / _WINDOW) + loads_E


def figures_text(
    parts: Sequence[tuple[dict[str, str], Metrics]],
    now: dict[str, float],
    unknown: int,
    reloads: Mapping[str, int] | None = None,
) -> bytes:
    """Return the figures of models, each under its own labels, in Prometheus' text format.

    Args:
        parts: labels of a model, and its figures.
        now: gauges that are of no model.
        unknown: how many requests asked for a model that there is not.
        reloads: how many attempts to load models again came to which end.
    """
    families: dict[str, Metric] = {name: _gauge(name, value) for name, value in now.items()}
    families["unknown"] = CounterMetricFamily(
        "advmoe_unknown_model_requests", "Inference requests for no model here.", unknown
    )
    ends = CounterMetricFamily(
        "advmoe_reloads", "Attempts to load a model's bundles again.", labels=["outcome"]
    )
    for outcome, count in (reloads or {}).items():
        ends.add_metric([outcome], count)
    families["reloads"] = ends
    for labels, metrics in parts:
        for family in metrics.families():
            known = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            known.samples += [
                sample._replace(labels={**sample.labels, **labels}) for sample in family.samples
            ]
    registry = CollectorRegistry()
    registry.register(_Given(list(families.values())))
    return generate_latest(registry)


def binned(values: NDArray[np.float32]) -> tuple[NDArray[np.int64], float]:
    """Return how many finite ``values`` lie in each bin of margins [B], and their sum."""
    finite = values[np.isfinite(values)].astype(np.float64)
    bins = np.searchsorted(_MARGINS, finite)  # the first whose upper bound is not less
    return np.bincount(bins, minlength=len(_MARGINS) + 1), float(finite.sum())


class Margins(Collector):
    """Histograms by layer, to which many values are added at once: of tokens there are many."""

    def __init__(self) -> None:
        self._of = {CLASSES: binned(np.zeros(0, np.float32))}

    def add(self, layer: str, counts_B: NDArray[np.int64], total: float) -> None:
        """Count margins of ``layer`` that were :func:`binned`."""
        before_B, sum_before = self._of.get(layer, (0, 0.0))
        self._of[layer] = counts_B + before_B, total + sum_before

    def collect(self) -> Iterator[Metric]:
        """Yield the histogram of the classes, and that of the routes."""
        classes = HistogramMetricFamily(
            "advmoe_class_margin", "Probability of the best class minus that of the second."
        )
        routes = HistogramMetricFamily(
            "advmoe_route_margin",
            "Share of the best expert minus that of the second, where scores are known.",
            labels=["layer"],
        )
        bounds = [*map(str, _MARGINS), "+Inf"]
        for layer, (counts_B, total) in list(self._of.items()):
            buckets = list(zip(bounds, np.cumsum(counts_B).tolist(), strict=True))
            if layer == CLASSES:
                classes.add_metric([], buckets, total)
            else:
                routes.add_metric([layer], buckets, total)
        yield from (classes, routes)


def _gauge(name: str, value: float) -> Metric:
    return GaugeMetricFamily(f"advmoe_{name}", f"{name.replace('_', ' ')} now.", value)


class _Given(Collector):
    """Families that were put together elsewhere."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


class _Now(Collector):
    """Gauges, as they are when somebody asks."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for name, value in self._metrics.now().items():
            yield _gauge(name, value)
        entropy = GaugeMetricFamily(
            "advmoe_route_entropy_bits", "Entropy of the recent loads of experts.", labels=["layer"]
        )
        for layer, bits in self._metrics.entropies().items():
            entropy.add_metric([layer], bits)
        yield entropy
        yield from _drift_families(*self._metrics.monitored())


def _drift_families(drifts: Sequence[Drift], windows: int) -> Iterator[Metric]:
    """Yield what the route monitor found in its last window."""
    names = ["layer", "of"]
    drift = GaugeMetricFamily(
        "advmoe_route_drift",
        "How far the last window was from what the export recorded: a total variation; of entropy "
        "bits.",
        labels=names,
    )
    alert = GaugeMetricFamily(
        "advmoe_route_alert", "Whether that is more than chance explains.", labels=names
    )
    for each in drifts:
        drift.add_metric([each.layer, each.of], each.value)
        alert.add_metric([each.layer, each.of], float(each.is_alarming))
    yield drift
    yield alert
    yield CounterMetricFamily("advmoe_route_windows", "Windows of the route monitor.", windows)

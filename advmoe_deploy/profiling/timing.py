"""Interleaved timing, so that a busy moment hits everything that is compared alike."""

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.progress import Progress, Silent, task

_RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int | None = None,
    warmup: int = 3,
    settle: int = 0,
    budget_s: float = 10.0,
    least: int = 30,
    most: int = 500,
    seed: int = 0,
    progress: Progress | None = None,
    name: str = "rounds",
) -> dict[str, NDArray[np.float64]]:
    """Return the seconds of each call in each round, one array per name, all of one length.

    In every round each call runs once, in an order shuffled anew; the collector of garbage is off
    meanwhile. Without ``rounds``, as many as ``budget_s`` allows, between ``least`` and ``most``.
    ``settle`` calls of the same, not timed, go before each that is: what runs again and again finds
    its memory in the caches, which others empty.
    ``progress`` hears between rounds of the task ``name``.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        for _ in range(warmup):
            for call in calls.values():
                call()
        if rounds is None:
            per_round = (1 + settle) * (time.perf_counter() - started) / max(1, warmup)
            rounds = int(np.clip(budget_s / max(per_round, 1e-9), least, most))
        progress = progress or Silent()
        with task(progress, name, rounds):
            return _time_rounds(calls, rounds, settle, seed, partial(progress.advance, name))
    finally:
        if was_on:
            gc.enable()


def _time_rounds(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    settle: int,
    seed: int,
    passed: Callable[[], None],
) -> dict[str, NDArray[np.float64]]:
    shuffle = np.random.default_rng(seed)
    names = list(calls)
    seconds = {name: np.empty(rounds) for name in names}
    for index in range(rounds):
        for position in shuffle.permutation(len(names)):
            name = names[position]
            for _ in range(settle):
                calls[name]()
            started = time.perf_counter_ns()
            calls[name]()
            seconds[name][index] = (time.perf_counter_ns() - started) / 1e9
        passed()
    return seconds


def ratio_of_medians(a: NDArray[np.float64], b: NDArray[np.float64], *, seed: int = 0) -> Ratio:
    """Return median(a) / median(b) with its 95 % interval, for two timings of the same rounds.

    Rounds are resampled in pairs, for what slowed a whole round slowed both, and in blocks of about
    sqrt(n) consecutive rounds, for a slow round has slow neighbours: drawn one by one, they would
    make the interval too narrow. Blocks wrap around at the end.

    Source: D. N. Politis and J. P. Romano, "A circular block-resampling procedure for stationary
    data" (1992).
    """
    rounds = len(a)
    block = max(1, round(math.sqrt(rounds)))
    starts = np.random.default_rng(seed).integers(0, rounds, (_RESAMPLES, -(-rounds // block), 1))
    draws = ((starts + np.arange(block)) % rounds).reshape(_RESAMPLES, -1)[:, :rounds]
    ratios = np.median(a[draws], axis=1) / np.median(b[draws], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))

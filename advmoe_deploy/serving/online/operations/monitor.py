"""Route monitor: whether images go to experts as they did when the model was exported.

The export recorded, over the images it checked on, how many rows each expert gets and the deciles
of two margins: of the routes (the best expert's share less the second's) and of the classes. The
images that are served are counted in windows, against these. A figure's drift is the total
variation between the two distributions: the share of images that would have to change places.

Drift says that traffic is other than it was: another camera, other classes, or an attack. That none
is seen says little about attacks: one that knows the monitor keeps to the margins of clean images.

Shapes: N images, T tokens of each, B bins.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.reports import ParityReport
from advmoe_deploy.serving.online.protocol import short_line

Routed = Mapping[str, NDArray[Any]]  # by layer

_log = logging.getLogger(__name__)
# Among margins by layer, those of the classes.
CLASSES = ""
# How often a figure whose images come as recorded is called drifted, at most, by window.
FALSE_ALARMS = 1e-4
# What loads that are even, and stay so, may seem to change their entropy by.
_ROUNDING_BITS = 1e-9
# How far deciles lie apart, at least, and from the ends of the scale, of margins whose rows are
# spread: more than the digits of float32, which make many margins near 1 the same.
_STEP = 1e-6


@dataclass(frozen=True)
class Drift:
    """Drift of a figure in the last whole window: ``value``, alarming above ``limit``.

    ``layer`` is that of a route, or :data:`CLASSES`; ``of`` is "load", "margin" or "class_margin",
    a total variation in [0, 1], or "entropy", the change in bits of the loads' entropy, whose limit
    is what loads within theirs can change it by.
    """

    layer: str
    of: str
    value: float
    limit: float

    @property
    def is_alarming(self) -> bool:
        """Whether chance alone does not explain it."""
        return self.value > self.limit


@dataclass
class _Figure:
    """A distribution [B] that was recorded, and its counts in the window that is open.

    ``edges`` lie between its bins; without them the bins are experts.
    """

    layer: str
    of: str
    recorded_B: NDArray[np.float64]
    edges: NDArray[np.float32] | None = None
    counts_B: NDArray[np.float64] = field(init=False)
    alarmed: set[str] = field(default_factory=set)  # of what there are alarms

    def __post_init__(self) -> None:
        self.counts_B = np.zeros(len(self.recorded_B))

    def add(self, values: NDArray[Any]) -> None:
        """Count experts, or margins."""
        bins = values.reshape(-1)
        if self.edges is not None:
            bins = np.searchsorted(self.edges, bins[np.isfinite(bins)])
        self.counts_B += np.bincount(bins, minlength=len(self.counts_B))

    def close(self, limit: float) -> list[Drift]:
        """Return the drifts of the window, and open the next."""
        total = self.counts_B.sum()
        shares_B, self.counts_B = self.counts_B / max(total, 1.0), np.zeros(len(self.counts_B))
        if not total:  # the engine does not tell
            return []
        drift = total_variation(shares_B, self.recorded_B)
        most = limit + _chance(self.recorded_B, limit)
        drifts = [Drift(self.layer, self.of, drift, most)]
        if self.of == "load":
            moved = _entropy(shares_B) - _entropy(self.recorded_B)
            down, up = entropy_range(self.recorded_B, most)
            drifts.append(Drift(self.layer, "entropy", abs(moved), up if moved > 0 else down))
        return drifts


class Monitor:
    """Holds answers against what an export recorded, window by window, for one thread."""

    def __init__(self, recorded: ParityReport, window: int) -> None:
        """Begin a window of at least so many images; 0 watches nothing."""
        self._images, self._window, self._seen = recorded.images, window, 0
        self._figures = _figures(recorded) if window else []
        self.drifts: list[Drift] = []
        self.windows = 0

    def add(self, images: int, expert_ids: Routed, margins: Routed) -> None:
        """Count so many ``images``: by layer ids [N, ...], and margins where they are known."""
        for figure in self._figures:
            values = (expert_ids if figure.of == "load" else margins).get(figure.layer)
            if values is not None:
                figure.add(values)
        self._seen += images
        if self._figures and self._seen >= self._window:
            self._close()

    def _close(self) -> None:
        limit = bound_of(self._seen, self._images)
        self._seen = 0
        self.windows += 1
        self.drifts = []
        for figure in self._figures:
            own = figure.close(limit)
            self.drifts += own
            for drift in own:
                if drift.is_alarming != (drift.of in figure.alarmed):
                    figure.alarmed ^= {drift.of}
                    _say(drift)


def _say(drift: Drift) -> None:
    of = f"{drift.of} of {drift.layer}" if drift.layer else drift.of
    became = "is not what the export recorded" if drift.is_alarming else "is as recorded again"
    bits = " bits" * (drift.of == "entropy")
    line = f"route monitor: {of} {became}: drift {drift.value:.3f}{bits}, limit {drift.limit:.3f}"
    _log.warning("%s", short_line(line))


def total_variation(first_B: NDArray[np.float64], second_B: NDArray[np.float64]) -> float:
    """Return half the sum of the differences of two distributions, in [0, 1]."""
    return float(np.abs(first_B - second_B).sum() / 2)


def entropy_range(recorded_B: NDArray[np.float64], most: float) -> tuple[float, float]:
    """Return by how many bits entropy can fall and rise within a total variation of ``most``.

    It is least where that share goes from the smallest to the largest bin, and greatest where the
    largest are cut to one level and the smallest filled up to another (Ho and Yeung 2010, "The
    interplay between entropy and variational distance"). So it alarms only where loads do.
    """
    ordered_B, own = np.sort(recorded_B), _entropy(recorded_B)
    least_B = ordered_B.copy()
    taken = np.minimum(ordered_B, np.maximum(0, most - (np.cumsum(ordered_B) - ordered_B)))
    taken[-1] = 0.0
    least_B -= taken
    least_B[-1] += taken.sum()
    even_B = ordered_B + _filled(ordered_B, most) - _filled(-ordered_B[::-1], most)[::-1]
    return own - _entropy(least_B) + _ROUNDING_BITS, _entropy(even_B) - own + _ROUNDING_BITS


def _filled(ordered_B: NDArray[np.float64], most: float) -> NDArray[np.float64]:
    """Return what fills the first bins up to one level, not above their mean: ``most`` in all."""
    count_B = np.arange(1, len(ordered_B) + 1)
    needed_B = ordered_B * count_B - np.cumsum(ordered_B)  # to fill all before to this one's level
    bins = int(np.searchsorted(needed_B, most, side="right"))
    level = (most + ordered_B[:bins].sum()) / bins
    filled_B: NDArray[np.float64] = np.maximum(0.0, min(level, ordered_B.mean()) - ordered_B)
    return filled_B


def bound_of(images: int, recorded: int) -> float:
    """Return by how much a drift exceeds its mean once in 1 / ``FALSE_ALARMS`` windows, at most.

    McDiarmid's inequality: one image of ``images`` moves the total variation by 1 / ``images``, one
    of those ``recorded`` by 1 / ``recorded`` (McDiarmid 1989, "On the method of bounded
    differences"). The tokens of an image count together.
    """
    return math.sqrt(-math.log(FALSE_ALARMS) / 2 * (1 / images + 1 / max(1, recorded)))


def _chance(recorded_B: NDArray[np.float64], limit: float) -> float:
    """Return a bound on the mean drift of images that come as recorded (Cauchy-Schwarz)."""
    variance = limit**2 * 2 / -math.log(FALSE_ALARMS)  # 1 / images + 1 / recorded
    return float(np.sqrt(recorded_B * (1 - recorded_B) * variance).sum() / 2)


def _figures(recorded: ParityReport) -> list[_Figure]:
    figures = []
    for layer in recorded.layers:
        load_B = np.array(layer.expert_load, np.float64)
        if len(load_B) > 1 and load_B.sum():
            figures.append(_Figure(layer.layer, "load", load_B / load_B.sum()))
        figures += _of_deciles(layer.layer, "margin", layer.margin_deciles)
    return figures + _of_deciles(CLASSES, "class_margin", recorded.class_margin_deciles)


def _of_deciles(layer: str, of: str, deciles: tuple[float, ...]) -> list[_Figure]:
    """Return the figure whose bins lie between the deciles, a tenth of the rows each, if any.

    There is none where many rows have one margin, as those whose best share is 1 to every digit.
    """
    if not deciles or np.diff((0.0, *deciles, 1.0)).min() < _STEP:
        return []
    even_B = np.full(len(deciles) + 1, 1 / (len(deciles) + 1))
    return [_Figure(layer, of, even_B, np.array(deciles, np.float32))]


def _entropy(shares_B: NDArray[np.float64]) -> float:
    some_B = shares_B[shares_B > 0]
    return float(-(some_B * np.log2(some_B)).sum())

"""Batch independence: an image's answer is the same however many others are asked about with it.

Shapes: N images, B images of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.parity.answers import Images
from advmoe_deploy.parity.intervals import chance_of_more
from advmoe_deploy.parity.tolerance import same_experts
from advmoe_deploy.runtime.runner import Prediction, Runner, joined
from advmoe_deploy.verify.evidence import Closeness
from advmoe_deploy.verify.findings import Finding

WHOLE = 64  # the batch size whose answers the others are compared with
UNLIKELY = 1e-3
MAX_FLIPS = 0.01  # share of the routes that may depend on the batch in a lower precision

_SIZES = (1, 2, 3, 7, 128)
_RISING = (4, 5, 6, 8, 9, 10, 11, 12, 13)  # one batch of each: a size in between seldom fails alone
_MOST_IMAGES, _FEWEST_IMAGES = 100, 16
_MOST_VALUES = 50 * 3 * 32 * 32  # pixels of all images together: larger ones take longer

Rows = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Difference:
    """Of ``rows`` images that were asked about again, those answered or routed otherwise."""

    rows: int
    moved: int
    flipped: int

    def matters(self, *, exact: bool) -> bool:
        """Return whether that is more than the precision explains."""
        if exact or self.moved:
            return self.moved + self.flipped > 0
        return chance_of_more(self.flipped, self.rows, MAX_FLIPS) < UNLIKELY

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(
            self.rows + other.rows, self.moved + other.moved, self.flipped + other.flipped
        )


def images_to_batch(x_NCHW: Images) -> int:
    """Return how many of the images batches are made of: about a second's work on a CPU."""
    fitting = _MOST_VALUES // max(1, int(np.prod(x_NCHW.shape[1:])))
    return min(len(x_NCHW), int(np.clip(fitting, _FEWEST_IMAGES, _MOST_IMAGES)))


def answers_in_batches(runner: Runner, x_NCHW: Images, size: int = WHOLE) -> Prediction:
    """Return the answers to all images in batches of exactly ``size``, the last one filled up."""
    rows_M = np.resize(np.arange(len(x_NCHW)), -(-len(x_NCHW) // size) * size)
    parts = [runner.infer(x_NCHW[rows_B]) for rows_B in np.split(rows_M, len(rows_M) // size)]
    return rows_of(joined(parts), np.arange(len(x_NCHW)), len(rows_M))


def rows_of(answer: Prediction, rows: Rows, images: int) -> Prediction:
    """Return the answers to the images ``rows`` of those to ``images``."""

    def taken(values: NDArray[np.generic]) -> NDArray[np.generic]:
        return values.reshape(images, -1, values.shape[-1])[rows].reshape(-1, values.shape[-1])

    return Prediction(
        answer.logits[rows],
        {name: taken(ids) for name, ids in answer.expert_ids.items()},  # type: ignore[misc]
        {name: taken(each) for name, each in answer.weights.items()},  # type: ignore[misc]
    )


def batch_findings(
    runner: Runner, x_NCHW: Images, close_N: Flags, closeness: Closeness
) -> list[Finding]:
    """Return what is wrong with the answers to batches of several sizes and other neighbours.

    ``close_N`` are the images with a close call of routes, which may go either way.
    """
    trial = _Trial(runner, x_NCHW, close_N, closeness)
    images = len(x_NCHW)
    # Drawn, not shuffled: a batch of all images has the same statistics in any order.
    drawn = np.random.default_rng(0).integers(0, images, 2 * trial.filled)
    found = trial.compared(np.split(drawn, len(drawn) // WHOLE))
    if found.matters(exact=closeness.exact):
        return [_neighbours(found)]
    by_size = {size: trial.compared(_in_batches(images, size)) for size in _SIZES}
    for rows_B in _rising(images):
        size = len(rows_B)
        by_size[size] = by_size.get(size, Difference(0, 0, 0)) + trial.compared([rows_B])
    bad = {s: each for s, each in sorted(by_size.items()) if each.matters(exact=closeness.exact)}
    return [_batch_size(bad, by_size)] if bad else []


class _Trial:
    """Answers to the images in whole batches, and the same images in others."""

    def __init__(
        self, runner: Runner, x_NCHW: Images, close_N: Flags, closeness: Closeness
    ) -> None:
        self.runner, self.x_NCHW, self.closeness = runner, x_NCHW, closeness
        self.close_N = close_N
        self.filled = -(-len(x_NCHW) // WHOLE) * WHOLE
        self.whole = answers_in_batches(runner, x_NCHW)

    def compared(self, batches: Sequence[Rows]) -> Difference:
        """Return how the answers to ``batches``, rows each, differ from those to whole ones."""
        rows_M = np.concatenate(batches)
        again = joined([self.runner.infer(self.x_NCHW[rows_B]) for rows_B in batches])
        whole = rows_of(self.whole, rows_M, len(self.x_NCHW))
        flipped_M = np.zeros(len(rows_M), dtype=bool)
        for name, ids in whole.expert_ids.items():
            same_R = same_experts(ids, again.expert_ids[name])
            flipped_M |= ~same_R.reshape(len(rows_M), -1).all(axis=1)
        near_M = self.closeness.near(again.logits, whole.logits)
        broken_M = [~np.isfinite(each.logits).all(axis=1) for each in (again, whole)]
        near_M |= broken_M[0] & broken_M[1]  # which is another finding
        close_M = self.close_N[rows_M]
        return Difference(
            rows=len(rows_M),
            moved=int((~near_M & ~flipped_M).sum()),
            flipped=int((flipped_M & ~close_M).sum()),
        )


def _in_batches(images: int, size: int) -> list[Rows]:
    """Return all rows in batches of ``size``; a remainder is one if there are enough images."""
    rows_M = np.resize(np.arange(images), max(images, size))
    return np.split(rows_M, range(size, len(rows_M), size))


def _rising(images: int) -> list[Rows]:
    rows_M = np.resize(np.arange(images), sum(_RISING))
    return np.split(rows_M, np.cumsum(_RISING)[:-1])


def _neighbours(found: Difference) -> Finding:
    message = (
        f"the answer to an image depends on the other images of its batch: among {WHOLE} "
        f"others, {found.moved} of {found.rows} logits and {found.flipped} routes change; look for "
        "BatchNorm in training mode, statistics over the batch, or routes taken from another row, "
        "and export again in eval mode"
    )
    return Finding(kind="neighbours", message=message)


def _batch_size(bad: dict[int, Difference], tried: dict[int, Difference]) -> Finding:
    total = sum(bad.values(), Difference(0, 0, 0))
    message = (
        f"the answer to an image depends on how many are asked about: in batches of "
        f"{_sizes(set(bad), set(tried))}, {total.moved} of {total.rows} logits and {total.flipped} "
        f"routes are not those in batches of {WHOLE}; look for a shape that was fixed at export, "
        "or a kernel that is wrong for that size, and serve other batches until it is mended"
    )
    return Finding(kind="batch-size", message=message)


def _sizes(bad: set[int], tried: set[int]) -> str:
    if bad == {1}:
        return "1 (single images)"
    numbers = ", ".join(map(str, sorted(bad)))
    more = tried - {1}
    if bad - {1} == {size for size in more if size % 2}:
        return f"{numbers} (odd sizes)"
    return f"{numbers} (all that were tried)" if bad == tried else numbers

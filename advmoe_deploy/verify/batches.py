"""Batch independence: an image's answer is the same however many others are asked about with it.

Shapes: N images, B images of a batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.parity.answers import Flags, Images
from advmoe_deploy.parity.intervals import chance_of_more
from advmoe_deploy.parity.tolerance import same_experts
from advmoe_deploy.runtime.runner import Prediction, Runner, joined
from advmoe_deploy.verify.evidence import UNLIKELY, Closeness
from advmoe_deploy.verify.findings import Finding

WHOLE = 64  # the batch size whose answers the others are compared with
MAX_FLIPS = 0.01  # share of the routes that may depend on the batch in a lower precision

_SMALL = (2, 4)  # in which the same neighbours and others are compared
_SIZES = (1, 2, 3, 7, 128)
_RISING = (4, 5, 6, 8, 9, 10, 11, 12, 13)  # one batch of each: a size in between seldom fails alone
_MOST_IMAGES, _FEWEST_IMAGES = 100, 16
_MOST_VALUES = 32 * 3 * 32 * 32  # pixels of all images together: larger ones take longer

RowIds = NDArray[np.int64]


@dataclass(frozen=True)
class BatchEffect:
    """Of ``rows`` images that were asked about again, those answered or routed otherwise."""

    rows: int
    moved: int
    flipped: int

    def matters(self, *, exact: bool) -> bool:
        """Return whether that is more than the precision explains."""
        if exact or self.moved:
            return self.moved + self.flipped > 0
        return chance_of_more(self.flipped, self.rows, MAX_FLIPS) < UNLIKELY


def images_to_batch(x_NCHW: Images) -> int:
    """Return how many of the images batches are made of: about a second's work on a CPU."""
    fitting = _MOST_VALUES // max(1, int(np.prod(x_NCHW.shape[1:])))
    return min(len(x_NCHW), int(np.clip(fitting, _FEWEST_IMAGES, _MOST_IMAGES)))


def answers_in_batches(runner: Runner, x_NCHW: Images, size: int = WHOLE) -> Prediction:
    """Return the answers to all images in batches of exactly ``size``, the last one filled up."""
    rows_M = np.resize(np.arange(len(x_NCHW)), -(-len(x_NCHW) // size) * size)
    parts = [runner.infer(x_NCHW[rows_B]) for rows_B in np.split(rows_M, len(rows_M) // size)]
    return rows_of(joined(parts), np.arange(len(x_NCHW)), len(rows_M))


def rows_of(answer: Prediction, rows: RowIds, images: int) -> Prediction:
    """Return the answers to the images ``rows`` of those to ``images``."""

    def taken(values: NDArray[np.generic]) -> NDArray[np.generic]:
        return values.reshape(images, -1, values.shape[-1])[rows].reshape(-1, values.shape[-1])

    return Prediction(
        answer.logits[rows],
        {name: taken(ids) for name, ids in answer.expert_ids.items()},  # type: ignore[misc]
        {name: taken(each) for name, each in answer.weights.items()},  # type: ignore[misc]
    )


def batch_findings(
    runner: Runner, x_NCHW: Images, whole: Prediction, close_N: Flags, closeness: Closeness
) -> list[Finding]:
    """Return what is wrong with the answers to batches of several sizes and other neighbours.

    ``whole`` are the answers in batches of :data:`WHOLE`; ``close_N`` are the images with a close
    call of routes, which may go either way.
    """
    trial = _Trial(runner, x_NCHW, whole, close_N, closeness)
    if found := trial.neighbours():
        return [_neighbours(*found)]
    bad = {
        size: each
        for size, each in sorted(trial.by_size().items())
        if each.matters(exact=closeness.exact)
    }
    return [_batch_size(bad)] if bad else []


class _Trial:
    """Answers to the images in whole batches, and the same images in others."""

    def __init__(
        self,
        runner: Runner,
        x_NCHW: Images,
        whole: Prediction,
        close_N: Flags,
        closeness: Closeness,
    ) -> None:
        self.runner, self.x_NCHW, self.closeness = runner, x_NCHW, closeness
        self.whole, self.close_N = whole, close_N
        self.images = len(x_NCHW)

    def neighbours(self) -> tuple[int, BatchEffect] | None:
        """Return the size of batches in which answers change with the neighbours, and how."""
        whole = self.compared(self._drawn(WHOLE), self.whole)
        if whole.matters(exact=self.closeness.exact):
            return WHOLE, whole
        small = []
        for size in _SMALL:
            base = answers_in_batches(self.runner, self.x_NCHW, size)
            small.append(self.compared(self._drawn(size), base))
            # Statistics spoil all small batches; what spoils one size alone has to do with it.
            if not small[-1].matters(exact=self.closeness.exact):
                return None
        return _SMALL[0], small[0]

    def by_size(self) -> dict[int, BatchEffect]:
        """Return by batch size how its answers differ from those to whole batches."""
        batches: dict[int, list[RowIds]] = {}
        for rows_B in [*(b for s in _SIZES for b in self._in_batches(s)), *self._rising()]:
            batches.setdefault(len(rows_B), []).append(rows_B)
        return {size: self.compared(each, self.whole) for size, each in batches.items()}

    def compared(self, batches: Sequence[RowIds], base: Prediction) -> BatchEffect:
        """Return how the answers to ``batches``, rows each, differ from ``base``, of all images."""
        rows_M = np.concatenate(batches)
        again = joined([self.runner.infer(self.x_NCHW[rows_B]) for rows_B in batches])
        expected = rows_of(base, rows_M, self.images)
        flipped_M = np.zeros(len(rows_M), dtype=bool)
        for name, ids in expected.expert_ids.items():
            same_R = same_experts(ids, again.expert_ids[name])
            flipped_M |= ~same_R.reshape(len(rows_M), -1).all(axis=1)
        near_M = self.closeness.near(again.logits, expected.logits)
        broken_M = [~np.isfinite(each.logits).all(axis=1) for each in (again, expected)]
        near_M |= broken_M[0] & broken_M[1]  # which is another finding
        return BatchEffect(
            rows=len(rows_M),
            moved=int((~near_M & ~flipped_M).sum()),
            flipped=int((flipped_M & ~self.close_N[rows_M]).sum()),
        )

    def _drawn(self, size: int) -> list[RowIds]:
        """Return batches of random images; shuffled ones would have the same statistics."""
        count = -(-self.images // size)
        rows = np.random.default_rng(size).integers(0, self.images, (count, size))
        return list(rows)

    def _in_batches(self, size: int) -> list[RowIds]:
        """Return all rows in batches of ``size``, and what remains."""
        rows_M = np.resize(np.arange(self.images), max(self.images, size))
        return np.split(rows_M, range(size, len(rows_M), size))

    def _rising(self) -> list[RowIds]:
        rows_M = np.resize(np.arange(self.images), sum(_RISING))
        return np.split(rows_M, np.cumsum(_RISING)[:-1])


def _neighbours(size: int, found: BatchEffect) -> Finding:
    message = (
        f"the answer to an image depends on the other images of its batch: with others in batches "
        f"of {size}, {found.moved} of {found.rows} logits and {found.flipped} routes change; look "
        "for BatchNorm in training mode, statistics over the batch, or routes taken from another "
        "row, and export again in eval mode"
    )
    return Finding(kind="neighbours", message=message)


def _batch_size(bad: dict[int, BatchEffect]) -> Finding:
    rows, moved, flipped = (
        sum(getattr(each, name) for each in bad.values()) for name in ("rows", "moved", "flipped")
    )
    message = (
        f"the answer to an image depends on how many are asked about: in batches of {_sizes(bad)}, "
        f"{moved} of {rows} logits and {flipped} routes are not those in batches of {WHOLE}; look "
        "for a shape that was fixed at export, or a kernel that is wrong for that size, and serve "
        "other batches until it is mended"
    )
    return Finding(kind="batch-size", message=message)


def _sizes(bad: Iterable[int]) -> str:
    """Return the sizes, and what they have in common."""
    numbers = ", ".join(map(str, bad))
    if set(bad) == {1}:
        return f"{numbers} (single images)"
    return f"{numbers} (odd sizes)" if all(size % 2 for size in bad) else numbers

"""Data set: uint8 images with labels, in three splits.

Shapes: N images, C channels, H height, W width.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from advmoe_deploy.specs import Fingerprint

# Training images that every set but the digits holds out to choose on; at most a fifth.
HOLDOUT_IMAGES = 1000

# The same images make a split for every command and every run.
SPLIT_SEED = 20230810


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, C, H, W] and their labels int64 [N]."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> "Split":
        """Return the first ``count`` images, or all of them."""
        return Split(self.images[:count], self.labels[:count])

    def take(self, rows: npt.NDArray[np.int64]) -> "Split":
        """Return the split of these rows."""
        return Split(np.ascontiguousarray(self.images[rows]), self.labels[rows])


@dataclass(frozen=True)
class Dataset:
    """A data set as :func:`~advmoe_deploy.data.registry.load_dataset` returns it.

    ``source`` is the name that loads it again, from any working folder. Models are chosen on
    ``holdout``, which is never part of the training images; ``test`` is only measured on. No two of
    them share an image. ``fingerprint`` is none where splits were put together by hand.
    """

    source: str
    class_names: tuple[str, ...]
    train: Split
    holdout: Split
    test: Split
    fingerprint: Fingerprint | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of one image."""
        channels, height, width = self.test.images.shape[1:]
        return (channels, height, width)


def to_float(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return ``images`` as float32 in [0, 1]: x / 255."""
    return images.astype(np.float32) / np.float32(255)


def mixed(labels: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return ``rows`` as they are, or, if they come class by class, dealt evenly by class.

    So the first so many images of a split are always of all classes. Class by class they come in
    whatever order of the classes, and in several parts: another class follows on an image less
    than a quarter as often as among shuffled ones. (Of four images a class or fewer that is the
    ascending order alone.)
    """
    steps = np.diff(labels[rows])
    shares = np.unique(labels[rows], return_counts=True)[1] / max(1, len(rows))
    shuffled = len(rows) * (1 - np.square(shares).sum())
    in_order = np.all(steps >= 0) and not np.all(steps > 0)  # not one image a class
    if not in_order and np.count_nonzero(steps) >= shuffled / 4:
        return rows
    (dealt,) = stratified_parts(labels[rows], ())
    return rows[dealt]


def stratified_parts(
    labels: npt.NDArray[np.int64], sizes: tuple[int, ...]
) -> list[npt.NDArray[np.int64]]:
    """Return disjoint row numbers, one array per size, then all the rows that remain.

    Each part holds the classes as evenly as the whole does: rows are shuffled, then ordered by
    their rank within their class relative to the class's size, and cut.
    """
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    by_class = np.argsort(labels[shuffled], kind="stable")
    _, counts = np.unique(labels, return_counts=True)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    rank = np.empty(len(labels))
    rank[by_class] = (np.arange(len(labels)) - before + 0.5) / np.repeat(counts, counts)
    dealt = shuffled[np.argsort(rank, kind="stable")].astype(np.int64)
    return np.split(dealt, np.cumsum(sizes))

"""Assembly of listings to a data set whose splits share no image.

Shapes: N images, C channels, H height, W width.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from advmoe_deploy.data.content import digests_of, fingerprint_of
from advmoe_deploy.data.dataset import Dataset, Split, mixed
from advmoe_deploy.data.layouts.listing import Listing
from advmoe_deploy.data.notices import say_once
from advmoe_deploy.data.pixels import Pixels, read_bytes, stacked
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError

# Released data sets have a few images twice; a larger share is a mistake in copying.
_NATURAL_SHARE = 0.005
_TINY = 64  # pixels a side


@dataclass(frozen=True)
class Dealt:
    """The rows of a listing that make a split, in this order."""

    listing: Listing
    rows: npt.NDArray[np.int64]

    @classmethod
    def mixed(cls, listing: Listing, rows: npt.NDArray[np.int64] | None = None) -> "Dealt":
        """Return ``rows``, by default all; dealt evenly by class if they come class by class."""
        rows = np.arange(len(listing)) if rows is None else rows
        return cls(listing, mixed(listing.labels_N, rows))

    def first(self, count: int) -> "Dealt":
        """Return the first ``count`` rows."""
        return Dealt(self.listing, self.rows[:count])


@dataclass(frozen=True)
class _Part:
    """A split with the digest of each image's pixels and its row in a listing, which names it."""

    split: Split
    digests: list[bytes]
    rows: Sequence[int]
    listing: Listing

    def without(self, digests: set[bytes]) -> "_Part":
        """Return the part less the images of these contents.

        Images from the end fill the gaps, so that a split of many gigabytes is not copied.
        """
        drop = np.asarray([digest in digests for digest in self.digests])
        kept = int((~drop).sum())
        order = np.arange(kept)
        order[drop[:kept]] = kept + np.flatnonzero(~drop[kept:])
        gaps = np.flatnonzero(drop[:kept])
        self.split.images[gaps] = self.split.images[order[gaps]]
        return _Part(
            Split(self.split.images[:kept], self.split.labels[order]),
            [self.digests[row] for row in order.tolist()],
            [self.rows[row] for row in order.tolist()],
            self.listing,
        )


def assemble(
    source: str,
    class_names: tuple[str, ...],
    *,
    train: Dealt,
    holdout: Dealt,
    test: Dealt,
    decoding: Decoding,
    exact: bool,
) -> Dataset:
    """Return the data set of three splits, read, and freed of images that two of them share.

    Images are compared by their pixels, as a model sees them. What the hold-out shares with the
    training images stays on the side that has it more often. Of images shared with the test set,
    few (released sets have some) are left out of the other two, and said; however many, where the
    test images are ours to choose.

    Raises:
        DataError: over 0.5 % of the test images are among the others too, nothing remains to train
            on or to hold out, or a file is no readable image.
    """
    trained, held, tested = (
        _read(dealt, decoding, exact=exact) for dealt in (train, holdout, test)
    )
    trained, held = _apart_from_test(source, (trained, held), tested)
    trained, held = _apart(source, trained, held)
    if not trained.digests or not held.digests:
        raise DataError(
            f"{source} holds {len({*trained.digests, *held.digests})} different images to train on "
            "that are no test images; give at least five"
        )
    splits = trained.split, held.split, tested.split
    return Dataset(
        source=source,
        class_names=class_names,
        train=splits[0],
        holdout=splits[1],
        test=splits[2],
        fingerprint=fingerprint_of(splits, (trained.digests, held.digests, tested.digests)),
    )


def read_split(dealt: Dealt, decoding: Decoding, *, exact: bool) -> Split:
    """Return a split alone, read.

    Raises:
        DataError: a file is no readable image.
    """
    return _read(dealt, decoding, exact=exact).split


def _where(parts: Sequence[_Part], digest: bytes) -> str:
    """Return the name of the first image of this content."""
    part = next(part for part in parts if digest in part.digests)
    return part.listing.where(part.rows[part.digests.index(digest)])


def _read(dealt: Dealt, decoding: Decoding, *, exact: bool) -> _Part:
    listing, rows = dealt.listing, dealt.rows.tolist()

    def read(row: int) -> Pixels:
        data, where = listing.encoded(row), listing.where(row)
        return read_bytes(data, where, decoding, exact=exact)

    def key() -> str:
        digest = hashlib.sha256()
        for row in rows:
            digest.update(listing.stamp(row).encode() + b"\n")
        return digest.hexdigest()

    # Threads that decode images of a few KiB wait for Python's lock most of the time.
    threads = 1 if exact and decoding.size <= _TINY else 0
    pixels = stacked(read, rows, decoding, key, threads=threads)
    split = Split(pixels, listing.labels_N[dealt.rows])
    return _Part(split, digests_of(split.images), rows, listing)


def _apart_from_test(source: str, parts: Sequence[_Part], test: _Part) -> list[_Part]:
    """Return ``parts`` without what they share with the test images."""
    shared = {digest for part in parts for digest in part.digests} & set(test.digests)
    if not shared:
        return list(parts)
    count = sum(digest in shared for digest in test.digests)
    example = min(shared)
    pair = f"{_where(parts, example)} and {_where([test], example)}"
    if count > _NATURAL_SHARE * len(test.digests) and not test.listing.split_off:
        raise DataError(
            f"{count:,} of {len(test.digests):,} test images of {source} are training images too, "
            f"such as {pair}; take them out of one of the two"
        )
    say_once(
        f"{source}: {count:,} test images are training images too, such as {pair}; they are "
        "not trained on"
    )
    return [part.without(shared) for part in parts]


def _apart(source: str, train: _Part, holdout: _Part) -> tuple[_Part, _Part]:
    """Return both without what they share, which stays where it is more often."""
    shared = set(train.digests) & set(holdout.digests)
    if not shared:
        return train, holdout
    trained, held = Counter(train.digests), Counter(holdout.digests)
    mostly_trained = {digest for digest in shared if trained[digest] > held[digest]}
    example = min(shared)
    names = [_where([part], example) for part in (train, holdout)]
    say_once(
        f"{source}: {len(shared):,} images are there more than once, such as {names[0]} and "
        f"{names[1]}; those of them that train are not held out"
    )
    return train.without(shared - mostly_trained), holdout.without(mostly_trained)

"""Listing of a split: labels, names and unread images, as a layout tells them."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from advmoe_deploy.errors import DataError


@dataclass(frozen=True)
class Listing:
    """The N images of one split, unread.

    ``encoded`` gives the bytes of an image file, ``where`` names the image for people, and
    ``stamp`` tells it from all others without decoding it. ``class_names`` is empty where the
    layout does not tell. ``split_off`` marks test images that we chose from among all.
    """

    labels_N: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    encoded: Callable[[int], Any]
    where: Callable[[int], str]
    stamp: Callable[[int], str]
    split_off: bool = False

    def __len__(self) -> int:
        return len(self.labels_N)

    def take(self, rows_N: npt.NDArray[np.int64], *, split_off: bool = False) -> "Listing":
        """Return the listing of these rows."""
        return replace(
            self,
            labels_N=self.labels_N[rows_N],
            encoded=lambda row: self.encoded(int(rows_N[row])),
            where=lambda row: self.where(int(rows_N[row])),
            stamp=lambda row: self.stamp(int(rows_N[row])),
            split_off=split_off,
        )


@dataclass(frozen=True)
class Wanted:
    """Names that a data set looks for: of columns, and of splits, the best first.

    With ``is_test_alone`` no training images are wanted: the test images stand in their place.
    With ``may_split`` class folders need no test split of their own.
    """

    images: tuple[str, ...] = ("image", "img", "images", "jpg", "jpeg", "png", "webp")
    labels: tuple[str, ...] = ("label", "labels", "fine_label", "fine_labels", "cls", "target")
    train: tuple[str, ...] = ("train", "training")
    test: tuple[str, ...] = ("test", "valid", "validation", "val", "testing")
    is_test_alone: bool = False
    may_split: bool = False

    @property
    def test_alone(self) -> "Wanted":
        """The same where no training images are wanted."""
        return replace(self, train=self.test, is_test_alone=True)


def joined(parts: Sequence[Listing]) -> Listing:
    """Return the listing of several files, one after the other, named as the first names them.

    Raises:
        DataError: another has classes that the first has not.
    """
    parts = [in_order_of(parts[0], part) for part in parts]
    ends = list(accumulate(len(part) for part in parts))

    def place(row: int) -> tuple[Listing, int]:
        index = bisect_right(ends, row)
        return parts[index], row - (ends[index] - len(parts[index]))

    def of(row: int, field: str) -> Any:
        part, own_row = place(row)
        return getattr(part, field)(own_row)

    return Listing(
        labels_N=np.concatenate([part.labels_N for part in parts]),
        class_names=parts[0].class_names,
        encoded=lambda row: of(row, "encoded"),
        where=lambda row: str(of(row, "where")),
        stamp=lambda row: str(of(row, "stamp")),
    )


def in_order_of(first: Listing, other: Listing) -> Listing:
    """Return ``other`` with its labels as ``first`` numbers the classes, where both tell names.

    Raises:
        DataError: ``other`` has classes that ``first`` has not.
    """
    names, own = first.class_names, other.class_names
    if not names or not own or own == names:
        return other
    if lone := sorted({*own} - {*names}) or sorted({name for name in own if own.count(name) > 1}):
        raise DataError(
            f"{first.where(0)}, and {other.where(0)}, have different classes: "
            f"{', '.join(lone[:3])} in the second; name them alike"
        )
    require_labels(other.where(0), other, len(own))
    places_C = np.asarray([names.index(name) for name in own], dtype=np.int64)
    return replace(other, labels_N=places_C[other.labels_N], class_names=names)


def require_labels(where: str, listing: Listing, num_classes: int) -> None:
    """Refuse a split without images, or with labels outside 0..``num_classes`` - 1.

    Raises:
        DataError: it is such a split.
    """
    if not len(listing):
        raise DataError(f"{where} holds no image; download it again")
    outside_N = (listing.labels_N < 0) | (listing.labels_N >= num_classes)
    if outside_N.any():
        example = listing.labels_N[outside_N][0]
        raise DataError(
            f"{where} holds labels outside 0..{num_classes - 1}, such as {example}; "
            f"it is not of {num_classes} classes"
        )

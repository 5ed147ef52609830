"""Image folders of any size and number of classes: ``CLASS/*``, with or without splits above.

Tables, WebDataset shards and batches of CIFAR are read as well.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from advmoe_deploy.data.assemble import Dealt, assemble, read_split
from advmoe_deploy.data.dataset import HOLDOUT_IMAGES, Dataset, Split, stratified_parts
from advmoe_deploy.data.decode import head_of
from advmoe_deploy.data.layouts.find import FOLDERS_FIRST, listings_of
from advmoe_deploy.data.layouts.listing import Listing, Wanted, require_labels
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError

_LOOKED_AT = 200
_WANTED = Wanted(test=("val", "valid", "validation", "test", "testing"), may_split=True)
_WAY_OUT = "put images into a folder for each class"


@dataclass(frozen=True)
class Survey:
    """Classes of a folder, the median of its images' shorter sides, and whether all are grey."""

    class_names: tuple[str, ...]
    side: int
    is_grey: bool


def load_image_folder(source: str, root: Path, decoding: Decoding) -> Dataset:
    """Return the images under ``root`` as uint8 [N, C, H, W], read as ``decoding`` says.

    The classes are the folders of ``train``, in alphabetical order, or what a table calls them;
    without a split for the test a fifth of each class becomes one, always the same. The
    hold-out is up to 1,000 of the training images, evenly by class, at most a fifth of them. Images
    are dealt evenly by class, always in the same order.

    Raises:
        DataError: a folder is missing or holds too few images, the splits have different classes,
            or a file is no readable image.
    """
    train, test, names = _listed(root)
    labels_N = train.labels_N
    held = min(HOLDOUT_IMAGES, len(train) // 5)
    if not held:
        raise DataError(f"{root} holds {len(train)} images; give at least five to train on")
    holdout_rows, train_rows = stratified_parts(labels_N, (held,))
    return assemble(
        source,
        names,
        train=Dealt(train, train_rows),
        holdout=Dealt(train, holdout_rows),
        test=Dealt.mixed(test),
        decoding=decoding,
        exact=False,
    )


def load_first_of_folder(
    root: Path, decoding: Decoding, count: int
) -> tuple[tuple[str, ...], Split]:
    """Return the classes and the first ``count`` test images, as :func:`load_image_folder` does.

    No other image is read.
    """
    _, test, names = _listed(root)
    return names, read_split(Dealt.mixed(test).first(count), decoding, exact=False)


def _listed(root: Path) -> tuple[Listing, Listing, tuple[str, ...]]:
    """Return training images, test images and classes, unread."""
    train, test = listings_of(root, _WANTED, FOLDERS_FIRST, _WAY_OUT)
    most = int(train.labels_N.max(initial=0))
    names = train.class_names or tuple(f"class {label}" for label in range(most + 1))
    for listing in (train, test):
        require_labels(str(root), listing, len(names))
    return train, test, names


def survey(root: Path) -> Survey:
    """Return what the training images under ``root`` are like, from the heads of some files.

    Raises:
        DataError: as for :func:`load_image_folder`, of the files that are looked at.
    """
    train, _, names = _listed(root)
    rows = np.linspace(0, len(train) - 1, min(len(train), _LOOKED_AT)).astype(int)
    heads = [head_of(train.encoded(int(row)), train.where(int(row))) for row in rows]
    side = int(np.median([min(head.width, head.height) for head in heads]))
    return Survey(names, side, is_grey=all(head.is_grey for head in heads))


def load_folder_test(root: Path, decoding: Decoding) -> Split:
    """Return the test images alone, in the same order; no training images need be there.

    The rest is as for :func:`load_image_folder`; the classes are those of the test images.
    """
    _, test = listings_of(root, _WANTED.test_alone, FOLDERS_FIRST, _WAY_OUT)
    classes = len(test.class_names) or int(test.labels_N.max(initial=0)) + 1
    require_labels(str(root), test, classes)
    return read_split(Dealt.mixed(test), decoding, exact=False)

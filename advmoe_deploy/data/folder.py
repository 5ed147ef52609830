"""Image folders of any size and number of classes, above all ``train/CLASS/*`` and ``val/CLASS/*``.

Tables, WebDataset shards and batches of CIFAR are read as well.
"""

from pathlib import Path

import numpy as np

from advmoe_deploy.data.assemble import Dealt, assemble, read_split
from advmoe_deploy.data.dataset import HOLDOUT_IMAGES, Dataset, Split, mixed, stratified_parts
from advmoe_deploy.data.layouts.find import FOLDERS_FIRST, listings_of
from advmoe_deploy.data.layouts.listing import Listing, Wanted, require_labels
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError

_SEED = 20230810
_WANTED = Wanted(test=("val", "valid", "validation", "test", "testing"))
_WAY_OUT = "put images into train/CLASS/ and val/CLASS/"


def load_image_folder(source: str, root: Path, decoding: Decoding) -> Dataset:
    """Return the images under ``root`` as uint8 [N, C, H, W], read as ``decoding`` says.

    The classes are the folders of ``train``, in alphabetical order, or what a table calls them; the
    hold-out is up to 1,000 of the training images, evenly by class, at most a fifth of them. Images
    are dealt evenly by class, always in the same order.

    Raises:
        DataError: a folder is missing or holds too few images, the splits have different classes,
            or a file is no readable image.
    """
    train, test = listings_of(root, _WANTED, FOLDERS_FIRST, _WAY_OUT)
    labels_N = train.labels_N
    most = int(labels_N.max(initial=0))
    names = train.class_names or tuple(f"class {label}" for label in range(most + 1))
    for listing in (train, test):
        require_labels(str(root), listing, len(names))
    held = min(HOLDOUT_IMAGES, len(train) // 5)
    if not held:
        raise DataError(f"{root} holds {len(train)} images; give at least five to train on")
    holdout_rows, train_rows = stratified_parts(labels_N, (held,), _SEED)
    return assemble(
        source,
        names,
        train=Dealt(train, train_rows),
        holdout=Dealt(train, holdout_rows),
        test=_dealt_test(test),
        decoding=decoding,
        exact=False,
    )


def load_folder_test(root: Path, decoding: Decoding) -> Split:
    """Return the test images alone, in the same order; no training images need be there.

    The rest is as for :func:`load_image_folder`; the classes are those of the test images.
    """
    _, test = listings_of(root, _WANTED.test_alone, FOLDERS_FIRST, _WAY_OUT)
    classes = len(test.class_names) or int(test.labels_N.max(initial=0)) + 1
    require_labels(str(root), test, classes)
    return read_split(_dealt_test(test), decoding, exact=False)


def _dealt_test(test: Listing) -> Dealt:
    return Dealt(test, mixed(test.labels_N, np.arange(len(test)), _SEED))

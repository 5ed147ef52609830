"""Digits, the embedded default: scikit-learn's 1,797 images of 8 x 8 pixels, no download."""

import numpy as np

from advmoe_deploy.data.content import digests_of, fingerprint_of
from advmoe_deploy.data.dataset import Dataset, Split, stratified_parts
from advmoe_deploy.errors import missing_extra

TEST_IMAGES = 400
_HOLDOUT = 200


def load_digits() -> Dataset:
    """Return the digits as uint8 [N, 1, 8, 8]: 1,197 train, 200 hold-out, 400 test.

    A grey level v of 0..16 becomes round(v * 255 / 16). The split is stratified and always the
    same.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise missing_extra("scikit-learn", "train") from None
    pixels, labels = load(return_X_y=True)
    images = np.rint(pixels * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    everything = Split(images, labels.astype(np.int64))
    sizes = (TEST_IMAGES, _HOLDOUT)
    parts = stratified_parts(everything.labels, sizes)
    test, holdout, train = (everything.take(rows) for rows in parts)
    splits = (train, holdout, test)
    digests = tuple(digests_of(split.images) for split in splits)
    return Dataset(
        source="digits",
        class_names=tuple(str(digit) for digit in range(10)),
        train=train,
        holdout=holdout,
        test=test,
        fingerprint=fingerprint_of(splits, digests),
    )

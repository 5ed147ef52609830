"""Test images that fit a model."""

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import UsageError
from advmoe_deploy.specs import ModelSpec


def matching_test_images(
    source: str, spec: ModelSpec, decoding: Decoding, count: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the first ``count`` test images of ``source``, by default all, and their labels.

    Images are float32 [N, C, H, W] in [0, 1], read from files as ``decoding`` says.

    Raises:
        UsageError: no source, no image, or images that the model does not take.
        DataError: the data set cannot be read.
    """
    if count is not None and count < 1:
        raise UsageError(f"images={count} is too few; take at least one")
    if not source:
        raise UsageError("the model does not say what it was trained on; pass --data")
    dataset = load_dataset(source, decoding)
    split = dataset.test
    if split.images.shape[1:] != spec.image_shape or len(dataset.class_names) != spec.num_classes:
        raise UsageError(
            f"{source} has images {split.images.shape[1:]} of {len(dataset.class_names)} classes, "
            f"the model takes {spec.image_shape} of {spec.num_classes}; pass matching --data"
        )
    return to_float(split.images[:count]), split.labels[:count]

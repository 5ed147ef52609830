"""Fit of data to a configuration, looked at before anything heavy is loaded."""

import math

from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.errors import UsageError
from advmoe_deploy.train.config import TrainConfig


def require_fit(config: TrainConfig, data: Dataset, processes: int) -> None:
    """Refuse data that the model does not take, or too few of them for a batch.

    Raises:
        UsageError: images or classes are others than the model's, or ``processes`` have no work.
    """
    model = config.model
    if model.image_shape != data.image_shape:
        channels, size, _ = data.image_shape
        way_out = f"set model.in_channels={channels} and model.image_size={size}"
        if config.start:  # the network is that of the weights
            way_out = f"choose other data, or leave --from {config.start.source} out"
        raise UsageError(
            f"{data.source} has images of {data.image_shape}, the model takes {model.image_shape}; "
            f"{way_out}"
        )
    if model.num_classes != len(data.class_names):
        raise UsageError(
            f"{data.source} has {len(data.class_names)} classes, not {model.num_classes}; "
            f"set model.num_classes={len(data.class_names)}"
        )
    images = len(data.train.first(config.train_images))
    parts = config.accumulate * math.ceil(images / config.batch_size)
    if images // parts < 2 * processes:
        raise UsageError(
            f"batch_size={config.batch_size} leaves under two images for each of {processes} "
            f"processes, with accumulate={config.accumulate} and {images} images in all"
        )


def steps_of(config: TrainConfig, data: Dataset) -> int:
    """Return how many batches the run takes."""
    images = len(data.train.first(config.train_images))
    return config.epochs * max(1, math.ceil(images / config.batch_size))

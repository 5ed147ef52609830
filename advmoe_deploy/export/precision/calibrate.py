"""Calibration of int8: scales from training images, clean and attacked on the torch model."""

import numpy as np
from onnx import ModelProto

from advmoe_deploy.data.dataset import Dataset, to_float
from advmoe_deploy.errors import DataError
from advmoe_deploy.export.partition.cut import Partition
from advmoe_deploy.export.precision.attacked import attacked_images
from advmoe_deploy.export.precision.gate import ATTACK
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.progress import Progress
from advmoe_deploy.reports import Calibration
from advmoe_deploy.specs import ThreatModel

CALIBRATION_IMAGES = 256


def calibrated(
    model: Classifier,
    parts: Partition,
    labelled: Dataset | None,
    threat: ThreatModel | None,
    *,
    symmetric: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[str, ModelProto], Calibration]:
    """Return the segments of ``parts`` that are worth it in int8, and what they were scaled on.

    Training images of ``labelled``, and as many attacked as in ``threat``, if there is one;
    ``symmetric`` scales are what TensorRT takes.

    Raises:
        DataError: there are no training images.
    """
    # The quantizer is loaded for int8 alone.
    from advmoe_deploy.export.precision.quantize import quantised_segments

    if labelled is None:
        raise DataError(
            "int8 is calibrated on training images, and neither the run nor --data names a data "
            "set; pass --data"
        )
    split = labelled.train.first(CALIBRATION_IMAGES)
    images = to_float(split.images)
    attacked = None
    if threat:
        attacked = attacked_images(model, images, split.labels, threat, progress=progress)
    both = images if attacked is None else np.concatenate([images, attacked])
    shape = model.spec.image_shape
    graphs, unvisited = quantised_segments(
        parts.plan, parts.graphs, both, shape, symmetric=symmetric
    )
    return graphs, Calibration(
        data=labelled.source,
        clean_images=len(images),
        attacked_images=len(both) - len(images),
        attack=None if attacked is None else ATTACK,
        epsilon=None if threat is None else threat.epsilon,
        all_rows=unvisited,
    )

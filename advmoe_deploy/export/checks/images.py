"""Images that an export is checked on.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from advmoe_deploy.data.dataset import Dataset, to_float
from advmoe_deploy.data.matching import in_order_of, label_map
from advmoe_deploy.data.registry import absolute, load_dataset
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError, MachineError, UsageError
from advmoe_deploy.models.checkpoint import Checkpoint
from advmoe_deploy.parity.answers import Images
from advmoe_deploy.specs import ModelSpec

PARITY_IMAGES = 1000
_NOISE = "random:"

_ON_NOISE = "--data random:1000 to check on noise"
_ADVICE = f"pass --data, or {_ON_NOISE}"


def absolute_source(source: str, size: int) -> str:
    """Return ``source`` as it is to be recorded: its path, if it has one, absolute.

    A folder of images that says no size gets ``size``, that of the model.
    """
    return source if not source or source.startswith(_NOISE) else absolute(source, size)


def parity_images(source: str | None, spec: ModelSpec, decoding: Decoding | None = None) -> Images:
    """Return up to 1,000 float32 images [N, C, H, W] in [0, 1] of ``source``, test images first.

    ``random:N`` are N images of seeded uniform noise. Image files are read as ``decoding`` says.

    Raises:
        UsageError: ``source`` is missing, unknown, of another image size or of other classes.
        DataError: the data set cannot be read.
        MachineError: it is to come from the hub, which cannot be reached.
    """
    if not source:
        raise UsageError(f"the run does not say what it was trained on; {_ADVICE}")
    if source.startswith(_NOISE):
        return _noise(source, spec)
    try:
        data = load_dataset(source, decoding)
    except (DataError, MachineError) as error:
        raise type(error)(f"{error}; or pass {_ON_NOISE}") from None
    splits = (data.test, data.holdout, data.train)
    images = np.concatenate([split.images[:PARITY_IMAGES] for split in splits])
    if images.shape[1:] != spec.image_shape:
        raise UsageError(
            f"{source} has images {images.shape[1:]}, the model takes {spec.image_shape}; {_ADVICE}"
        )
    if len(data.class_names) != spec.num_classes:
        raise UsageError(
            f"{source} has {len(data.class_names)} classes, the model {spec.num_classes}; {_ADVICE}"
        )
    return to_float(images[:PARITY_IMAGES])


def labelled_images(
    sources: Iterable[str],
    checkpoint: Checkpoint,
    say: Callable[[str], None],
    class_map: Mapping[str, str] | None = None,
) -> Dataset | None:
    """Return the first of ``sources`` that is a data set of the images and classes of a model.

    Its classes are put into the model's order, once ``class_map`` has renamed them. ``None`` if
    none is: noise has no labels, and a run may have come without its data. ``say`` hears why a data
    set is left out.

    Raises:
        UsageError: a data set does not fit the model with ``class_map``.
    """
    for source in dict.fromkeys(sources):
        if not source or source.startswith(_NOISE):
            continue
        try:
            data = load_dataset(source, checkpoint.decoding)
            return _fitting(data, checkpoint, class_map or {})
        except (DataError, MachineError, UsageError) as error:
            if class_map and isinstance(error, UsageError):  # else the map is ignored
                raise UsageError(f"{source}: {error}") from None
            say(f"accuracy is not measured on {source}: {error}")
    return None


def _fitting(data: Dataset, checkpoint: Checkpoint, class_map: Mapping[str, str]) -> Dataset:
    """Return ``data`` in the order of the model's classes, or refuse what it was not made for."""
    model, names = checkpoint.model, checkpoint.class_names
    if data.image_shape != model.image_shape:
        raise UsageError(f"its images are {data.image_shape}, the model takes {model.image_shape}")
    if len(data.class_names) != model.num_classes:
        raise UsageError(f"it has {len(data.class_names)} classes, the model {model.num_classes}")
    mapped = label_map(data.class_names, names, class_map)
    if not mapped.by_name:
        raise UsageError("its classes are called otherwise than the model's: by numbers")
    return in_order_of(data, names, mapped)


def _noise(source: str, spec: ModelSpec) -> Images:
    count = source.removeprefix(_NOISE)
    if not count.isdecimal() or not 1 <= int(count) <= 100_000:
        raise UsageError(f"'{source}' is no number of images in 1..100000; say random:1000")
    shape = (int(count), *spec.image_shape)
    return np.random.default_rng(0).random(shape, dtype=np.float32)

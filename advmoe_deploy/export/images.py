"""The images an export is checked on, and the few that travel with it.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.data.dataset import Dataset, to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import DataError, UsageError
from advmoe_deploy.export.reference import Answers, Images
from advmoe_deploy.models.checkpoint import Checkpoint
from advmoe_deploy.specs import ModelSpec

PARITY_IMAGES = 1000
GOLDEN_IMAGES = 64

_ADVICE = "pass --data, or --data random:1000 to check on noise"


def parity_images(source: str | None, spec: ModelSpec) -> Images:
    """Return up to 1,000 float32 images [N, C, H, W] in [0, 1] of ``source``, test images first.

    ``random:N`` are N images of seeded uniform noise.

    Raises:
        UsageError: ``source`` is missing, unknown or of another image size.
        DataError: the data set cannot be read.
    """
    if not source:
        raise UsageError(f"the run does not say what it was trained on; {_ADVICE}")
    if source.startswith("random:"):
        return _noise(source, spec)
    try:
        data = load_dataset(source)
    except DataError as error:
        raise DataError(f"{error}; {_ADVICE}") from None
    splits = (data.test, data.holdout, data.train)
    images = np.concatenate([split.images[:PARITY_IMAGES] for split in splits])
    if images.shape[1:] != spec.image_shape:
        raise UsageError(
            f"{source} has images {images.shape[1:]}, the model takes {spec.image_shape}; {_ADVICE}"
        )
    return to_float(images[:PARITY_IMAGES])


def labelled_images(
    sources: Iterable[str], checkpoint: Checkpoint, say: Callable[[str], None]
) -> Dataset | None:
    """Return the first of ``sources`` that is a data set of the images and classes of a model.

    ``None`` if none is: noise has no labels, and a run may have come without its data. ``say``
    hears why a data set is left out.
    """
    for source in dict.fromkeys(sources):
        if not source or source.startswith("random:"):
            continue
        try:
            data = load_dataset(source)
        except (DataError, UsageError) as error:
            say(f"accuracy is not measured on {source}: {error}")
            continue
        if difference := _difference(data, checkpoint):
            say(f"accuracy is not measured on {source}: {difference}")
            continue
        return data
    return None


def _difference(data: Dataset, checkpoint: Checkpoint) -> str:
    """Return in what ``data`` is not what the model was made for; nothing if it is."""
    model, names = checkpoint.model, checkpoint.class_names
    if data.image_shape != model.image_shape:
        return f"its images are {data.image_shape}, the model takes {model.image_shape}"
    if len(data.class_names) != model.num_classes:
        return f"it has {len(data.class_names)} classes, the model {model.num_classes}"
    nameless = names == tuple(str(label) for label in range(len(names)))  # imported weights
    if not nameless and data.class_names != names:
        return "its classes are called otherwise than the model's"
    return ""


def _noise(source: str, spec: ModelSpec) -> Images:
    count = source.removeprefix("random:")
    if not count.isdecimal() or not 1 <= int(count) <= 100_000:
        raise UsageError(f"'{source}' is no number of images in 1..100000; say random:1000")
    shape = (int(count), *spec.image_shape)
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def golden_rows(answers: Answers) -> list[int]:
    """Return the first 64 images, and one more for each expert that none of these visits."""
    images = len(answers.logits)
    rows = list(range(min(GOLDEN_IMAGES, images)))
    for route in answers.routes.values():
        ids_NX = route.expert_ids.reshape(images, -1)
        for expert in range(route.scores.shape[1]):
            visitors = np.flatnonzero((ids_NX == expert).any(axis=1))
            if len(visitors) and not np.isin(visitors, rows).any():
                rows.append(int(visitors[0]))
    return rows


def write_golden(file: Path, images: Images, answers: Answers) -> None:
    """Write a few images and what the torch model answers, routes by layer, for later checks."""
    rows = golden_rows(answers)
    arrays: dict[str, NDArray[Any]] = {"images": images[rows], "logits": answers.logits[rows]}
    for layer, route in answers.routes.items():
        for name in ("scores", "expert_ids", "weights"):
            values = getattr(route, name)
            # of tokens, [N, T, ...]; of images, [N, ...]
            by_image = values.reshape(len(images), -1, values.shape[1])[rows]
            of_images = len(values) == len(images)
            arrays[f"{layer}.{name}"] = by_image[:, 0] if of_images else by_image
    np.savez(file, **arrays)  # type: ignore[arg-type]

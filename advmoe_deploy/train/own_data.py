"""Settings for images of one's own, chosen from the images and the device, each with its reason."""

import json
import math
import textwrap
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.data.folder import Survey
from advmoe_deploy.data.layouts.class_folders import some_of
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.device import has_bf16, has_gpu
from advmoe_deploy.train.fields import Start
from advmoe_deploy.train.recipes.by_family import MANY

# Sizes in pixels; beyond 64 the network begins with a stride, and a CPU would take days.
_CPU_SIZES, _GPU_SIZES = (8, 16, 32), (8, 16, 32, 64, 128)
_SMALL_STEM = 64
_EPSILON = 8 / 255
# Of the recipe for few images: its share of epsilon, and steps enough for it to learn.
_STEP_SHARE = 0.625
_FEW_STEPS = 300
_FEW_EPOCHS = (24, 40)
# Its share of the recipe's learning rate: at all of it the loss of batches so small leaps, and what
# was learned is lost in one run of several.
_FEW_RATE = 0.5
# Mean and deviation are those of so many images; a constant channel is not blown up.
_MEASURED_IMAGES = 5000
_LEAST_STD = 1 / 255
_AT_ONCE = 100
_NAMED = 5
# What a network that is there already decides, and the share of the recipe's learning rate for it.
_OF_NETWORK = ("model.image_size", "model.in_channels", "model.mean", "model.std", "model.stem")
_FINE_TUNING = 0.25


@dataclass(frozen=True)
class Choice:
    """A setting, the value that was chosen for it, and why."""

    key: str
    value: object
    why: str

    @property
    def setting(self) -> str:
        """The choice as ``key=value``."""
        return f"{self.key}={json.dumps(self.value)}"

    @property
    def told(self) -> str:
        """The value and the reason, for people."""
        return f"{_text(self.value)}: {self.why}"


def size_for(survey: Survey) -> int:
    """Return the size in pixels that these images are scaled to unless told."""
    sizes = _GPU_SIZES if has_gpu() else _CPU_SIZES
    return max((size for size in sizes if size <= survey.side), default=sizes[0])


def of_images(data: Dataset, survey: Survey | None) -> list[Choice]:
    """Return the settings that the images alone decide, of whatever network."""
    channels, size, _ = data.image_shape
    names = ", ".join(data.class_names[:_NAMED])
    if more := len(data.class_names[_NAMED:]):
        names += f" and {more} more"
    seen = f"{_central_squares(survey, size)}; " if survey else ""
    images = data.train.images[:_MEASURED_IMAGES]
    mean, std = _mean_and_std(images)
    measured = f"of {len(images):,} training images"
    return [
        Choice("data", data.source, "as given"),
        Choice("model.num_classes", len(data.class_names), names),
        Choice("model.image_size", size, f"{seen}--image-size takes another"),
        Choice("model.in_channels", channels, "all are grey" if channels == 1 else "in colour"),
        Choice("model.mean", [round(float(v), 4) for v in mean], measured),
        Choice("model.std", [round(max(float(v), _LEAST_STD), 4) for v in std], measured),
        Choice("model.stem", "imagenet" if size > _SMALL_STEM else "small", "by the image size"),
    ]


def _central_squares(survey: Survey, size: int) -> str:
    """Return what becomes of the images, and why the size is not theirs where it is smaller."""
    scaled = "the central square of each is cut out and scaled to it"
    if survey.side <= size:
        return scaled
    return (
        f"{scaled}; shorter sides are {survey.side} (median), but time grows with the square of "
        "the size"
    )


def _mean_and_std(
    images_NCHW: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return both of each channel, in [0, 1] pixels, without a copy of all images as floats."""
    count = images_NCHW[:, 0].size
    sums_C, squares_C = np.zeros((2, images_NCHW.shape[1]), np.int64)
    for first in range(0, len(images_NCHW), _AT_ONCE):
        part = images_NCHW[first : first + _AT_ONCE]
        sums_C += part.sum((0, 2, 3), dtype=np.int64)
        squares_C += np.square(part, dtype=np.uint16).sum((0, 2, 3), dtype=np.int64)
    mean_C = sums_C / count
    # Rounding may leave a constant channel a little below zero.
    variance_C = np.maximum(squares_C / count - mean_C**2, 0)
    return mean_C / 255, np.sqrt(variance_C) / 255


def of_family(
    family: str, early: TrainConfig, data: Dataset, stem: str, given: Collection[str]
) -> list[Choice]:
    """Return the settings that number and kind of the images decide for a family's recipe.

    ``early`` holds the values of the keys ``given``, validated.
    """
    channels, size, _ = data.image_shape
    images = len(data.train)
    epsilon = early.threat.epsilon if "threat.epsilon" in given else _EPSILON
    flips = channels > 1
    choices = [
        Choice("name", f"{stem}-{family}", "data and family"),
        Choice("threat.epsilon", epsilon, "as papers have it; --epsilon takes another"),
        Choice("flip", flips, "of photographs" if flips else "mirrored, grey scans may be others"),
        Choice("crop_padding", size // 8, "an eighth of the size"),
    ]
    epochs = early.epochs if "epochs" in given else None
    if images >= MANY:
        return choices + _many()
    return choices + _few(images, epsilon, epochs, early.lr) + _even(early)


def _few(images: int, epsilon: float, given_epochs: int | None, lr: float) -> list[Choice]:
    batch = 16 if images < 64 else 32 if images < 512 else 64
    least, most = _FEW_EPOCHS
    epochs = min(most, max(least, math.ceil(_FEW_STEPS / math.ceil(images / batch))))
    return [
        Choice("epochs", epochs, f"for {images:,} training images; --epochs takes another"),
        Choice("batch_size", batch, f"for {images:,} training images"),
        Choice("lr", _FEW_RATE * lr, "half the recipe's, for small batches"),
        Choice("attack_step_size", _STEP_SHARE * epsilon, f"{_STEP_SHARE} of epsilon"),
        Choice("evaluate_every", max(1, (given_epochs or epochs) // 6), "six times or so"),
    ]


def _even(early: TrainConfig) -> list[Choice]:
    """Return what keeps a router of few steps from sending all images to one expert."""
    if early.model.family != "advmoe" or early.method != "advmoe":
        return []
    return [Choice("even_loads", True, "so few steps may not teach the router to use each expert")]


def _many() -> list[Choice]:
    if has_bf16():
        return [Choice("precision", "bf16-mixed", "this device computes in bfloat16")]
    return [Choice("precision", "32-true", "this CPU does not compute in bfloat16")]


def of_origin(choices: Collection[Choice], base: TrainConfig, *, is_family: bool) -> list[Choice]:
    """Return those of ``choices`` that a trained model leaves open, and what it brings along."""
    kept = [choice for choice in choices if choice.key not in _OF_NETWORK]
    if is_family:
        kept = [choice for choice in kept if choice.key != "lr"]
        gentle = base.lr * _FINE_TUNING
        kept.append(Choice("lr", gentle, "a quarter of the recipe's, to keep what was learned"))
    return kept


def told(config: TrainConfig) -> str:
    """Return what was chosen as a short table for people, of at most 80 columns."""
    width = max(map(len, config.chosen), default=0) + 4
    lines = ["chosen for these images and this device; --set KEY=VALUE changes each:"]
    for key, text in config.chosen.items():
        own = textwrap.wrap(text, 80 - width, break_long_words=False, break_on_hyphens=False)
        lines += [f"  {key if not n else '':<{width - 2}}{line}" for n, line in enumerate(own)]
    return "\n".join(lines)


def chosen(
    data: Dataset, recipe: str, choices: Collection[Choice], start: Start | None = None
) -> dict[str, str]:
    """Return what is to be said and recorded of ``choices``, the split first."""
    counts = f"{len(data.train):,} to train on, {len(data.holdout):,} to choose the epoch by, "
    begun = {}
    per_class = np.bincount(data.train.labels, minlength=len(data.class_names)).tolist()
    lone = [name for name, n in zip(data.class_names, per_class, strict=True) if not n]
    untaught = f"; none to train on of {some_of(lone)}" if lone else ""
    if start:
        new = f"but for a new head for these {len(data.class_names)} classes"
        begun["from"] = f"{start.source}: its weights, {new if start.new_head else 'head included'}"
    return {
        "recipe": recipe,
        **begun,
        "split": f"{counts}{len(data.test):,} to test on{untaught}",
        **{choice.key: choice.told for choice in choices if choice.key not in ("data", "name")},
    }


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if not isinstance(value, float):
        return str(value)
    levels = 255 * value
    return f"{round(levels)}/255" if math.isclose(levels, round(levels)) else f"{value:.4g}"

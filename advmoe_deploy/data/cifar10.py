"""CIFAR-10 from parquet files in the hub's layout, or from the hub by name.

A row is ``img`` = {bytes, path}, the bytes being a PNG of 32 x 32 pixels, and ``label`` = 0..9.
"""

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from advmoe_deploy.data.dataset import Dataset, Split
from advmoe_deploy.errors import DataError, missing_extra

HUB_NAME = "uoft-cs/cifar10"
FOLDER_VARIABLE = "ADVMOE_DATA"
CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
HOLDOUT_IMAGES = 1000
_HOLDOUT_SEED = 20230810
_SHAPE = (32, 32, 3)
_WAY_OUT = f"give cifar10:PATH or set {FOLDER_VARIABLE}"


def load_cifar10(source: str, folder: Path | None) -> Dataset:
    """Return CIFAR-10 as uint8 [N, 3, 32, 32].

    It comes from the parquet files of ``folder``; without one, of ``$ADVMOE_DATA/cifar10``;
    without that, from the hub. The hold-out is a fixed 1,000 of the training images.

    Raises:
        DataError: a file is missing or damaged, or the hub cannot be reached.
    """
    folder = folder or _default_folder()
    if folder is None:
        train, test = _from_hub("train"), _from_hub("test")
    else:
        train, test = _from_folder(folder, "train"), _from_folder(folder, "test")
    # A tiny copy of the data still leaves four fifths of it to train on.
    size = min(HOLDOUT_IMAGES, len(train) // 5)
    order = np.random.default_rng(_HOLDOUT_SEED).permutation(len(train))
    return Dataset(
        source=source,
        class_names=CLASS_NAMES,
        train=train.take(np.sort(order[size:])),
        holdout=train.take(np.sort(order[:size])),
        test=test,
    )


def _default_folder() -> Path | None:
    root = os.environ.get(FOLDER_VARIABLE)
    return Path(root) / "cifar10" if root else None


def _from_folder(folder: Path, split: str) -> Split:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; {_WAY_OUT}, a folder of parquet files")
    files = sorted(folder.glob(f"**/{split}-*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no {split}-*.parquet; {_WAY_OUT}")
    parts = [_from_parquet(file) for file in files]
    return Split(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )


def _from_parquet(file: Path) -> Split:
    try:
        import pyarrow.parquet
        from pyarrow import ArrowException
    except ImportError:
        raise missing_extra("pyarrow", "train") from None
    try:
        table = pyarrow.parquet.read_table(file, columns=["img", "label"])
        encoded = table.column("img").combine_chunks().field("bytes").to_pylist()
        labels = table.column("label").to_pylist()
    except (ArrowException, OSError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{file} is no readable CIFAR-10 parquet ({reason}); download it again"
        ) from None
    return _split(str(file), encoded, labels)


def _from_hub(split: str) -> Split:
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "train") from None
    try:
        table = datasets.load_dataset(HUB_NAME, split=split)
        table = table.cast_column("img", datasets.Image(decode=False))
        encoded = [row["bytes"] for row in table["img"]]
        return _split(HUB_NAME, encoded, list(table["label"]))
    # ValueError, FileNotFoundError and several network errors, by version and by cause.
    except (OSError, ValueError, RuntimeError) as error:
        reason = type(error).__name__
        raise DataError(f"{HUB_NAME} cannot be had from the hub ({reason}); {_WAY_OUT}") from None


def _split(where: str, encoded: Iterable[Any], labels: list[Any]) -> Split:
    images = [_decode(data, f"{where}, row {row}") for row, data in enumerate(encoded)]
    if not images:
        raise DataError(f"{where} holds no image; download it again")
    if not all(isinstance(label, int) and 0 <= label < len(CLASS_NAMES) for label in labels):
        raise DataError(f"{where} holds labels outside 0..{len(CLASS_NAMES) - 1}; not CIFAR-10")
    stacked = np.stack(images).transpose(0, 3, 1, 2)
    return Split(np.ascontiguousarray(stacked), np.asarray(labels, dtype=np.int64))


def _decode(data: Any, where: str) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, TypeError, SyntaxError, ValueError) as error:
        raise DataError(f"{where}: no readable image ({type(error).__name__})") from None
    if pixels.shape != _SHAPE:
        raise DataError(f"{where}: {pixels.shape} pixels, not {_SHAPE}; this is not CIFAR-10")
    return pixels

"""Data sets in the hub's layout: parquet files of encoded images and labels, or the hub itself.

A row holds an image as {bytes, path} and an integer label.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from advmoe_deploy.data.dataset import Dataset, Split, mixed
from advmoe_deploy.data.pixels import exactly, stacked
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError, missing_extra, reason_of
from advmoe_deploy.process import without_telemetry

FOLDER_VARIABLE = "ADVMOE_DATA"
HOLDOUT_IMAGES = 1000
_SEED = 20230810


@dataclass(frozen=True)
class HubSet:
    """One data set of the hub: where it is, its columns, its images (``size`` pixels square)."""

    name: str
    hub_name: str
    num_classes: int
    size: int
    image: str = "image"
    label: str = "label"
    train: str = "train"
    test: str = "test"

    @property
    def way_out(self) -> str:
        """What to do when the data cannot be had."""
        return f"give {self.name}:PATH or set {FOLDER_VARIABLE}"


HUB_SETS = {
    each.name: each
    for each in (
        HubSet("cifar10", "uoft-cs/cifar10", 10, 32, image="img"),
        HubSet("cifar100", "uoft-cs/cifar100", 100, 32, image="img", label="fine_label"),
        HubSet("tiny-imagenet", "zh-plus/tiny-imagenet", 200, 64, test="valid"),
    )
}
_CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclass(frozen=True)
class _Rows:
    """Encoded images, their labels, and the names of the classes if the files tell them."""

    encoded: list[Any]
    labels: list[Any]
    names: tuple[str, ...]


def load_hub_set(hub_set: HubSet, source: str, folder: Path | None, decoding: Decoding) -> Dataset:
    """Return the data set as uint8 [N, C, H, W], read as ``decoding`` says.

    It comes from the parquet files of ``folder``; without one, of ``$ADVMOE_DATA/NAME``; without
    that, from the hub. The hold-out is a fixed 1,000 of the training images. Images keep their
    order, unless they come class by class: then they are dealt evenly by class.

    Raises:
        DataError: a file is missing or damaged, there are too few images, or the hub cannot be
            reached.
    """
    folder = folder or _default_folder(hub_set)
    read = _from_hub if folder is None else _from_folder
    train, test = (read(hub_set, split, folder) for split in (hub_set.train, hub_set.test))
    order = np.random.default_rng(_SEED).permutation(len(train.labels)).astype(np.int64)
    # A tiny copy of the data still leaves four fifths of it to train on.
    size = min(HOLDOUT_IMAGES, len(order) // 5)
    if not size:
        raise DataError(f"{source} holds {len(order)} images to train on; give at least five")
    return Dataset(
        source=source,
        class_names=_class_names(hub_set, train.names),
        train=_split(hub_set, train, np.sort(order[size:]), decoding),
        holdout=_split(hub_set, train, np.sort(order[:size]), decoding),
        test=_split(hub_set, test, np.arange(len(test.labels)), decoding),
    )


def _class_names(hub_set: HubSet, found: tuple[str, ...]) -> tuple[str, ...]:
    if len(found) == hub_set.num_classes:
        return found
    if hub_set.name == "cifar10":
        return _CIFAR10_CLASSES
    return tuple(f"class {label}" for label in range(hub_set.num_classes))


def _default_folder(hub_set: HubSet) -> Path | None:
    root = os.environ.get(FOLDER_VARIABLE)
    return Path(root) / hub_set.name if root else None


def _from_folder(hub_set: HubSet, split: str, folder: Path | None) -> _Rows:
    assert folder is not None
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; {hub_set.way_out}, a folder of parquet files")
    files = sorted(folder.glob(f"**/{split}-*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no {split}-*.parquet; {hub_set.way_out}")
    parts = [_from_parquet(hub_set, file) for file in files]
    return _checked(
        hub_set,
        str(folder),
        _Rows(
            [data for part in parts for data in part.encoded],
            [label for part in parts for label in part.labels],
            parts[0].names,
        ),
    )


def _from_parquet(hub_set: HubSet, file: Path) -> _Rows:
    try:
        import pyarrow.parquet
        from pyarrow import ArrowException
    except ImportError:
        raise missing_extra("pyarrow", "train") from None
    try:
        table = pyarrow.parquet.read_table(file, columns=[hub_set.image, hub_set.label])
        encoded = table.column(hub_set.image).combine_chunks().field("bytes").to_pylist()
        labels = table.column(hub_set.label).to_pylist()
        names = _names_in(table.schema.metadata or {}, hub_set.label)
    except (ArrowException, OSError, KeyError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{file}: {reason_of(error, 'read')}") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{file} is no readable {hub_set.name} parquet ({reason}); download it again"
        ) from None
    return _Rows(encoded, labels, names)


def _names_in(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """Return the class names that the hub's library leaves in a parquet file, if it did."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, ValueError, TypeError):
        return ()


def _from_hub(hub_set: HubSet, split: str, _: Path | None) -> _Rows:
    try:
        with without_telemetry():
            import datasets
    except ImportError:
        raise missing_extra("datasets", "train") from None
    try:
        table = datasets.load_dataset(hub_set.hub_name, split=split)
        table = table.cast_column(hub_set.image, datasets.Image(decode=False))
        encoded = [row["bytes"] for row in table[hub_set.image]]
        names = tuple(getattr(table.features[hub_set.label], "names", ()))
        return _checked(
            hub_set, hub_set.hub_name, _Rows(encoded, list(table[hub_set.label]), names)
        )
    # ValueError, FileNotFoundError and several network errors, by version and by cause.
    except (OSError, ValueError, RuntimeError) as error:
        reason = type(error).__name__
        raise DataError(
            f"{hub_set.hub_name} cannot be had from the hub ({reason}); {hub_set.way_out}"
        ) from None


def _checked(hub_set: HubSet, where: str, rows: _Rows) -> _Rows:
    if not rows.labels:
        raise DataError(f"{where} holds no image; download it again")
    last = hub_set.num_classes - 1
    if not all(isinstance(label, int) and 0 <= label <= last for label in rows.labels):
        raise DataError(f"{where} holds labels outside 0..{last}; not {hub_set.name}")
    return rows


def _split(
    hub_set: HubSet, rows: _Rows, chosen: npt.NDArray[np.int64], decoding: Decoding
) -> Split:
    labels = np.asarray(rows.labels, dtype=np.int64)
    chosen = mixed(labels, chosen, _SEED)

    def read(row: int) -> Any:
        where = f"{hub_set.name}, row {row}"
        return exactly(rows.encoded[row], where, decoding)

    def key() -> str:
        digest = hashlib.sha256()
        for row in chosen:
            digest.update(hashlib.sha256(rows.encoded[row] or b"").digest())
        return digest.hexdigest()

    images = stacked(read, chosen.tolist(), decoding, key)
    return Split(images, labels[chosen])

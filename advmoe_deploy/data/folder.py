"""Image folders: ``train/CLASS/*`` and ``val/CLASS/*`` (or ``test/``), as ImageNet is unpacked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from advmoe_deploy.data.dataset import Dataset, Split, mixed, stratified_parts
from advmoe_deploy.data.decode import decode_file
from advmoe_deploy.data.pixels import Pixels, stacked
from advmoe_deploy.decoding import SUFFIXES, Decoding
from advmoe_deploy.errors import DataError

_SEED = 20230810
_HOLDOUT_IMAGES = 1000


@dataclass(frozen=True)
class _Listing:
    files: list[Path]
    labels: list[int]


def load_image_folder(source: str, root: Path, decoding: Decoding) -> Dataset:
    """Return the images under ``root`` as uint8 [N, C, H, W], read as ``decoding`` says.

    The classes are the folders of ``train``, in alphabetical order; the hold-out is up to 1,000 of
    the training images, evenly by class, at most a fifth of them. Images are dealt evenly by class,
    always in the same order.

    Raises:
        DataError: a folder is missing or holds too few images, the splits have different classes,
            or a file is no readable image.
    """
    train_root, test_root = root / "train", _first_folder(root, ("val", "valid", "test"))
    names = _classes(train_root)
    if _classes(test_root) != names:
        raise DataError(f"{train_root} and {test_root} hold different classes; name them alike")
    train, test = _listing(train_root, names), _listing(test_root, names)
    labels = np.asarray(train.labels, dtype=np.int64)
    held = min(_HOLDOUT_IMAGES, len(labels) // 5)
    if not held:
        raise DataError(f"{train_root} holds {len(labels)} images; give at least five to train on")
    holdout_rows, train_rows = stratified_parts(labels, (held,), _SEED)
    test_labels = np.asarray(test.labels, dtype=np.int64)
    test_rows = mixed(test_labels, np.arange(len(test_labels)), _SEED)
    return Dataset(
        source=source,
        class_names=names,
        train=_split(train, train_rows.tolist(), decoding),
        holdout=_split(train, holdout_rows.tolist(), decoding),
        test=_split(test, test_rows.tolist(), decoding),
    )


def _first_folder(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{root} holds no folder {' or '.join(names)}; it should have train/CLASS/*")


def _classes(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise DataError(f"{root} is no folder; put images into {root}/CLASS/")
    names = tuple(sorted(folder.name for folder in root.iterdir() if folder.is_dir()))
    if len(names) < 2:
        raise DataError(f"{root} holds {len(names)} class folders; give at least two")
    return names


def _listing(root: Path, names: Sequence[str]) -> _Listing:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(f for f in (root / name).rglob("*") if f.suffix.lower() in SUFFIXES)
        if not found:
            raise DataError(f"{root / name} holds no image ({', '.join(SUFFIXES)})")
        files += found
        labels += [label] * len(found)
    return _Listing(files, labels)


def _split(listing: _Listing, rows: Sequence[int], decoding: Decoding) -> Split:
    def read(row: int) -> Pixels:
        return decode_file(listing.files[row], decoding).pixels

    chosen = [listing.files[row] for row in rows]

    def key() -> str:
        return "\n".join(f"{file} {file.stat().st_mtime_ns}" for file in chosen)

    labels = np.asarray([listing.labels[row] for row in rows], dtype=np.int64)
    return Split(stacked(read, rows, decoding, key), labels)

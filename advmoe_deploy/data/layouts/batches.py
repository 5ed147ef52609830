"""CIFAR as its authors release it: batches of raw pixels, as Python pickles or in binary.

``cifar-10-batches-py``, ``cifar-100-python``, ``cifar-10-batches-bin``, ``cifar-100-binary``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from advmoe_deploy.data.layouts.copies import chosen_folder
from advmoe_deploy.data.layouts.listing import Listing, Wanted, joined
from advmoe_deploy.data.layouts.pickles import read_pickle
from advmoe_deploy.data.layouts.tree import Tree, parent_of
from advmoe_deploy.errors import DataError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class _Release:
    """The files of one release; ``label_bytes`` before the pixels where they are binary."""

    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int = 0

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test)


_RELEASES = (
    _Release(tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
    _Release(("train",), "test", "meta"),
    _Release(
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt", 1
    ),
    _Release(("train.bin",), "test.bin", "fine_label_names.txt", 2),
)


def cifar_batches(tree: Tree, wanted: Wanted) -> tuple[Listing, Listing] | None:
    """Return the training and test batches below a folder, or ``None`` if there are none.

    Raises:
        DataError: one of them is missing or damaged.
    """
    files = set(tree.files)
    for whole in _RELEASES:
        release = replace(whole, train=(whole.test,)) if wanted.is_test_alone else whole
        folders = [parent_of(f) for f in tree.files if Path(f).name == release.train[0]]
        beside = ("test_batch", "test_batch.bin", release.names)  # other files are called train
        folders = [f for f in folders if any(_join(f, name) in files for name in beside)]
        if folders:
            folder = tree.root / chosen_folder(tree.root, folders)
            missing = [name for name in release.files if not (folder / name).is_file()]
            if missing:
                raise DataError(f"{folder} lacks {', '.join(missing)}; unpack the archive again")
            names = _names(folder / release.names, release)
            parts = {name: _batch(folder / name, release, names) for name in release.files}
            return joined([parts[name] for name in release.train]), parts[release.test]
    return None


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _names(file: Path, release: _Release) -> tuple[str, ...]:
    """Return the class names, none where the file that tells them is not there."""
    if not file.is_file():
        return ()
    if release.label_bytes:
        return tuple(file.read_text(encoding="utf-8", errors="replace").split())
    told = read_pickle(file)
    return tuple(told.get("fine_label_names") or told.get("label_names") or ())


def _batch(file: Path, release: _Release, names: tuple[str, ...]) -> Listing:
    read = _binary if release.label_bytes else _pickled
    pixels_ND, labels = read(file, release)
    if pixels_ND is None or pixels_ND.ndim != 2 or pixels_ND.shape != (len(labels), _PIXELS):
        shape = None if pixels_ND is None else pixels_ND.shape
        raise DataError(
            f"{file} holds {len(labels)} labels and pixels {shape}, not {_PIXELS} an image; "
            "download it again"
        )
    stamp, images = file.stat().st_mtime_ns, pixels_ND  # a name that is never None

    def encoded(row: int) -> bytes:
        planes = images[row].reshape(3, _SIDE, _SIDE)
        pixels: bytes = planes.transpose(1, 2, 0).tobytes()
        return b"P6 %d %d 255\n" % (_SIDE, _SIDE) + pixels

    return Listing(
        labels_N=np.asarray(labels, dtype=np.int64),
        class_names=names,
        encoded=encoded,
        where=lambda row: f"{file}, row {row}",
        stamp=lambda row: f"{file} {stamp} {row}",
    )


def _pickled(file: Path, _: _Release) -> tuple[npt.NDArray[np.uint8] | None, Sequence[int]]:
    found = read_pickle(file)
    labels = found.get("fine_labels") or found.get("labels")
    if not isinstance(labels, list) or not all(map(_is_label, labels)):
        raise DataError(
            f"{file} holds {', '.join(map(str, found))}, and no list of labels; download it again"
        )
    data = found.get("data")
    return data if isinstance(data, np.ndarray) else None, labels


def _is_label(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 31


def _binary(file: Path, release: _Release) -> tuple[npt.NDArray[np.uint8] | None, Sequence[int]]:
    row = release.label_bytes + _PIXELS
    raw = np.fromfile(file, np.uint8)
    if not len(raw) or len(raw) % row:
        raise DataError(f"{file} has {len(raw):,} bytes, no multiple of {row}; download it again")
    rows = raw.reshape(-1, row)
    return rows[:, release.label_bytes :], rows[:, release.label_bytes - 1].tolist()

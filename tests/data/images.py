"""Small images for the tests of data, no two of them alike, and the layouts made of them."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE = 32


def pixels(number: int) -> np.ndarray:
    """Return image ``number`` as uint8 [32, 32, 3]."""
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(number)).save(file, "PNG")
    return file.getvalue()


def write_png(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(number))


def write_table(
    path: Path, numbers: Sequence[int], *, image: str = "img", label: str = "label"
) -> None:
    """Write the images of these numbers, the last digit of each its label."""
    rows = [{"bytes": png(number), "path": None} for number in numbers]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = pa.array([number % 10 for number in numbers], pa.int64())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image: pa.array(rows, kind), label: labels}), path)


def write_folders(root: Path, names: Sequence[str] = ("a", "b"), *, first: int = 0) -> Path:
    """Write ten images of each class to train on and three to test on; class i begins at 100 i."""
    for start, (split, count) in ((0, ("train", 10)), (50, ("val", 3))):
        for label, name in enumerate(names):
            for index in range(count):
                number = first + 100 * label + start + index
                write_png(root / split / name / f"{index}.png", number)
    return root

"""Small images for the tests of data, no two of them alike, and the layouts made of them."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

SIDE = 32
# Formats and modes of photographs in turn; of every fourth the format can hold EXIF.
FORMS = (
    ("jpg", "RGB"),
    ("png", "RGB"),
    ("webp", "RGB"),
    ("jpg", "CMYK"),
    ("bmp", "RGB"),
    ("png", "L"),
    ("png", "P"),
    ("png", "RGBA"),
)


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


def write_photos(root: Path, count: int = 12) -> Path:
    """Write ``count`` photographs of each of three classes: ``CLASS/*``, as people have them.

    Of scikit-learn's real images: pieces of a temple and of a flower, and handwritten digits, of
    many sizes, in the formats and modes of :data:`FORMS`, every fourth stored upside down with a
    note to turn it.
    """
    kinds = {"temple": _pieces(0, count), "flower": _pieces(1, count), "digit": _digits(count)}
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    for name, images in kinds.items():
        (root / name).mkdir(parents=True)
        for index, image in enumerate(images):
            suffix, mode = FORMS[index % len(FORMS)]
            file = root / name / f"{index:03}.{suffix}"
            turned = index % 4 == 3
            image = image.convert(mode)
            stored = image.transpose(Image.Transpose.ROTATE_180) if turned else image
            stored.save(file, exif=upside_down if turned else Image.Exif())
    return root


def _pieces(which: int, count: int) -> list[Image.Image]:
    photo = Image.fromarray(load_sample_images().images[which])
    random = np.random.default_rng(which)
    pieces = []
    for _ in range(count):
        width, height = (int(side) for side in random.integers(90, 200, 2))
        left, top = (int(random.integers(most)) for most in (640 - width, 427 - height))
        pieces.append(photo.crop((left, top, left + width, top + height)))
    return pieces


def _digits(count: int) -> list[Image.Image]:
    grey = (load_digits().images[:count] * 255 / 16).astype(np.uint8)
    return [Image.fromarray(g).resize((96, 120)).convert("RGB") for g in grey]

"""From encoded image files to the uint8 arrays that training reads."""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from advmoe_deploy.errors import DataError

CACHE_VARIABLE = "ADVMOE_CACHE"
# A split that is larger lives in a file that the system pages in, and is decoded only once.
IN_MEMORY_BYTES = 4 << 30

Pixels = npt.NDArray[np.uint8]
# What Pillow raises, by format and by damage; the last for sizes that would fill the memory.
_UNREADABLE = (
    UnidentifiedImageError,
    OSError,
    TypeError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
)


def decoded(data: Any, where: str, size: int, *, exact: bool) -> Pixels:
    """Return one image as RGB uint8 [size, size, 3].

    An image of another size is an error if ``exact``; otherwise its shorter side is scaled to
    8/7 of ``size`` (256 for 224; not at all up to 64 pixels) and its middle is cut out.

    Raises:
        DataError: ``data`` are not the bytes of an image, or it has the wrong size.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            rgb = image.convert("RGB")
            if not exact and rgb.size != (size, size):
                margin = size * 8 // 7 if size > 64 else size
                scale = margin / min(rgb.size)
                width, height = (max(margin, round(side * scale)) for side in rgb.size)
                rgb = _middle(rgb.resize((width, height), Image.Resampling.BILINEAR), size)
            pixels = np.asarray(rgb)
    except _UNREADABLE as error:
        raise DataError(f"{where}: no readable image ({type(error).__name__})") from None
    if pixels.shape != (size, size, 3):
        raise DataError(f"{where}: {pixels.shape} pixels, not {(size, size, 3)}")
    return pixels


def _middle(image: Image.Image, size: int) -> Image.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return ImageOps.crop(image, (left, top, image.width - size - left, image.height - size - top))


def stacked(
    read: Callable[[int], Pixels], rows: Sequence[int], size: int, key: Callable[[], str]
) -> Pixels:
    """Return ``read(row)`` of each row as uint8 [N, 3, size, size].

    A result above 4 GiB is kept in a file under ``$ADVMOE_CACHE`` (by default
    ``~/.cache/advmoe``), named by a hash of ``key()``, and found there the next time: the key must
    tell these images, in this order, from all others.
    """
    shape = (len(rows), 3, size, size)
    if int(np.prod(shape)) <= IN_MEMORY_BYTES:
        images = np.empty(shape, np.uint8)
        _fill(images, read, rows)
        return images
    return _cached(read, rows, shape, key())


def _fill(images: Pixels, read: Callable[[int], Pixels], rows: Sequence[int]) -> None:
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        for index, pixels in enumerate(pool.map(read, rows)):
            images[index] = pixels.transpose(2, 0, 1)


def _cached(
    read: Callable[[int], Pixels], rows: Sequence[int], shape: tuple[int, ...], key: str
) -> Pixels:
    root = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/advmoe").expanduser()
    root.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(f"{key} {shape}".encode()).hexdigest()[:24]
    file, partial = root / f"{digest}.npy", root / f"{digest}.{os.getpid()}.partial.npy"
    if not file.is_file():
        try:
            images = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
            _fill(images, read, rows)
            images.flush()
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    # Copy-on-write: torch wants writable memory, the file must not change.
    found: Pixels = np.load(file, mmap_mode="c")
    return found

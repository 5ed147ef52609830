"""Arrays of decoded images that data sets hold, in memory or in a file."""

import hashlib
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import PIL

from advmoe_deploy.data.decode import DecodedImage, decode
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError
from advmoe_deploy.files import at_home, staged_file
from advmoe_deploy.process import cache_folder, default_threads, usable_cpus

CACHE_VARIABLE = "ADVMOE_CACHE"
# A split that is larger lives in a file that the system pages in, and is decoded only once.
IN_MEMORY_BYTES = 4 << 30

Pixels = npt.NDArray[np.uint8]


def read_bytes(data: Any, where: str, decoding: Decoding, *, exact: bool) -> Pixels:
    """Return the image that the bytes ``data`` encode, as ``decoding`` says.

    Raises:
        DataError: ``data`` are not the bytes of an image, or, if ``exact``, it has another size
            than that of ``decoding``.
    """
    if not isinstance(data, bytes):
        raise DataError(f"{where}: holds no encoded image")
    image = decode_bytes(data, where, decoding)
    if exact and image.original != (decoding.size, decoding.size):
        width, height = image.original
        raise DataError(
            f"{where}: {width} x {height} pixels, not {decoding.size} x {decoding.size}"
        )
    return image.pixels


def decode_bytes(data: bytes, where: str, decoding: Decoding) -> DecodedImage:
    """Return the image that ``data`` encode, which ``where`` names; see :func:`decode`."""
    return decode(io.BytesIO(data), where, decoding)


def stacked(
    read: Callable[[int], Pixels],
    rows: Sequence[int],
    decoding: Decoding,
    key: Callable[[], str],
    *,
    threads: int = 0,
) -> Pixels:
    """Return ``read(row)`` of each row, decoded by ``decoding``, as uint8 [N, C, H, W].

    A result above 4 GiB is kept in a file under ``$ADVMOE_CACHE`` (by default
    ``~/.cache/advmoe-deploy/images``), named by a hash of ``key()`` and of how they are decoded,
    and found there the next time: the key must tell these files, in this order, from all others.
    Decoding takes ``threads``; 0: OMP_NUM_THREADS, else the usable CPUs.
    """
    shape = (len(rows), decoding.channels, decoding.size, decoding.size)
    if int(np.prod(shape)) <= IN_MEMORY_BYTES:
        images = np.empty(shape, np.uint8)
        _fill(images, read, rows, threads)
        return images
    # Another Pillow may bring another JPEG decoder.
    decoder = f"{decoding.model_dump_json()} Pillow {PIL.__version__}"
    return _cached(read, rows, shape, f"{decoder} {key()}")


def _fill(
    images: Pixels, read: Callable[[int], Pixels], rows: Sequence[int], threads: int = 0
) -> None:
    if threads == 1:
        for index, row in enumerate(rows):
            images[index] = read(row)
        return
    # Pillow decodes outside Python's lock.
    with ThreadPoolExecutor(threads or default_threads() or usable_cpus()) as pool:
        for index, pixels in enumerate(pool.map(read, rows)):
            images[index] = pixels


def _mapped(stream: BinaryIO, shape: tuple[int, ...]) -> Pixels:
    """Return the pixels of an NPY file, which ``stream`` becomes."""
    kind = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, kind)
    stream.flush()
    begin = stream.tell()
    if sys.platform == "linux":  # a full disk is an error here, and the end of the process later
        os.posix_fallocate(stream.fileno(), 0, begin + math.prod(shape))
    return np.memmap(stream, np.uint8, "r+", begin, shape)


def _cached(
    read: Callable[[int], Pixels], rows: Sequence[int], shape: tuple[int, ...], key: str
) -> Pixels:
    own = os.environ.get(CACHE_VARIABLE)
    root = at_home(own) if own else cache_folder() / "images"
    root.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(f"{key} {shape}".encode()).hexdigest()[:24]
    file = root / f"{digest}.npy"
    if not file.is_file():
        with staged_file(file) as stream:
            _fill(_mapped(stream, shape), read, rows)
    # Copy-on-write: torch wants writable memory, the file must not change.
    found: Pixels = np.load(file, mmap_mode="c")
    return found

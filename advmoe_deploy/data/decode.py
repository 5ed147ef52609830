"""Decoder of image files, the only one and without torch: the same pixels everywhere."""

import functools
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from advmoe_deploy.decoding import FORMATS, Decoding
from advmoe_deploy.errors import DataError, MachineError, reason_of

# What Pillow's decoders are known to raise on damaged files; a warning where warnings are errors.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    EOFError,
    RuntimeError,
    SystemError,
    Warning,
    struct.error,
    zlib.error,
)
_MODES = {1: "L", 3: "RGB"}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Filters of warnings belong to the process, so one thread at a time may change them.
_warning_filters = threading.Lock()


@dataclass(frozen=True)
class DecodedImage:
    """Pixels of one image, uint8 [C, H, W], and the (width, height) of its file, ``original``."""

    pixels: NDArray[np.uint8]
    original: tuple[int, int]


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Return those of :data:`FORMATS` that the installed Pillow has, AVIF since 11.3."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode_file(path: Path, decoding: Decoding) -> DecodedImage:
    """Return the image at ``path`` as ``decoding`` says.

    Raises:
        DataError: no such file, or no readable image; see :func:`decode`.
        MachineError: the memory does not suffice.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise DataError(f"{path}: no such file")
        with path.open("rb") as file:
            return decode(file, str(path), decoding)
    except OSError as error:
        raise DataError(f"{path}: {reason_of(error, 'read')}") from None


def decode(file: BinaryIO, where: str, decoding: Decoding) -> DecodedImage:
    """Return the image in ``file``, which ``where`` names, as ``decoding`` says.

    Raises:
        DataError: no image of the formats that are read, damaged, truncated, above ``max_pixels``,
            or of pixels without a range.
        MachineError: the memory does not suffice.
    """
    formats = [name for name in known_formats() if name in decoding.formats]
    try:
        with _opened(file, formats) as image:
            width, height = image.size
            if width * height > decoding.max_pixels:
                raise DataError(
                    f"{where}: {width} x {height} pixels exceed the limit of {decoding.max_pixels}"
                )
            image.load()
            pixels = np.asarray(_scaled(_upright(image, where, decoding), decoding))
    except UnidentifiedImageError:
        kinds = f"{', '.join(formats[:-1])} or {formats[-1]}"
        raise DataError(f"{where}: not a {kinds} image") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: {error}") from None
    except MemoryError:
        raise MachineError(f"{where}: not enough memory to decode it; leave it out") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where}: damaged image: {reason}") from None
    pixels_HWC = pixels.reshape(decoding.size, decoding.size, decoding.channels)
    return DecodedImage(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)), (width, height))


@contextmanager
def _no_warnings() -> Iterator[None]:
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _opened(file: BinaryIO, formats: list[str]) -> Image.Image:
    with _no_warnings():
        return Image.open(file, formats=formats)


def _upright(image: Image.Image, where: str, decoding: Decoding) -> Image.Image:
    """Return a loaded image with the channels of ``decoding``, turned as a camera noted."""
    mode = _MODES.get(decoding.channels)
    if mode is None:
        raise DataError(f"{where}: an image has 1 or 3 channels, the model {decoding.channels}")
    turn = _UPRIGHT.get(_orientation(image))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # which Pillow warns about if it is not asked for
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image, where)
    if image.mode not in (mode, "RGB"):
        image = image.convert("RGB")
    if image.mode != mode:
        image = image.convert(mode)
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none; damaged metadata spoil no image."""
    with _no_warnings():
        try:  # of a TIFF, Pillow has applied it on loading and says 1
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
        except _DAMAGE:
            return 1


def _eight_bits(image: Image.Image, where: str) -> Image.Image:
    """Return grey of up to 16 bits as 8; Pillow's own conversion clips at 255."""
    tags = getattr(image, "tag_v2", None)
    if image.mode == "F" or (image.mode == "I" and tags):
        raise DataError(f"{where}: 32-bit or signed pixels have no known range; save 8 or 16 bits")
    bits = tags[ExifTags.Base.BitsPerSample][0] if tags else 16
    most = 2**bits - 1
    grey = (np.asarray(image).astype(np.uint32) * 255 + most // 2) // most
    if tags and tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
        grey = 255 - grey  # white is zero
    return Image.fromarray(grey.astype(np.uint8))


def _scaled(image: Image.Image, decoding: Decoding) -> Image.Image:
    """Return the central square, scaled from its box: memory follows the result."""
    size = decoding.size
    if image.size == (size, size):
        return image
    side = min(image.size) * size / decoding.shorter_side
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)

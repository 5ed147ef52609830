"""Decoder of image files, the only one and without torch: the same pixels everywhere."""

import functools
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from advmoe_deploy.data.effort import Pieces, require_few_scans
from advmoe_deploy.data.upright import upright
from advmoe_deploy.decoding import IMAGE_FORMATS, Decoding
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
_GREY = ("1", "L", "LA")  # of equal channels, so that one is scaled for all three
# Rows cost memory of their own, 8 bytes and more, however short they are.
_MOST_ROWS = 1 << 22
# Images of more pixels are decoded one at a time, however many threads ask.
_LARGE = 1 << 24
_large_images = threading.Lock()
# Filters of warnings belong to the process, so one thread at a time may change them.
_warning_filters = threading.Lock()


@dataclass(frozen=True)
class DecodedImage:
    """Pixels of one image, uint8 [C, H, W], and the (width, height) of its file, ``original``."""

    pixels: NDArray[np.uint8]
    original: tuple[int, int]


@dataclass(frozen=True)
class ImageHead:
    """Head of an image file: its size in pixels, and whether it is grey."""

    width: int
    height: int
    is_grey: bool


def head_of(data: bytes, where: str) -> ImageHead:
    """Return the head of the image file that ``data`` are, without decoding its pixels.

    Raises:
        DataError: no image of the formats that are read, or a damaged one.
    """
    formats = [*known_formats()]
    with _told(where, formats), _opened(io.BytesIO(data), where, formats) as image:
        grey = image.mode in _GREY or image.mode.startswith(("I", "F"))
        return ImageHead(*image.size, is_grey=grey)


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Return those of :data:`IMAGE_FORMATS` that the installed Pillow has, AVIF since 11.3."""
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


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


def decode(
    file: BinaryIO,
    where: str,
    decoding: Decoding,
    admit: Callable[[int], None] = lambda pixels: None,
) -> DecodedImage:
    """Return the image in ``file``, which ``where`` names, as ``decoding`` says.

    ``admit`` is told how many pixels the file has before any is decoded; what it raises is raised.

    Raises:
        DataError: no image of the formats that are read, damaged, truncated, above ``max_pixels``,
            of more than 4,194,304 rows, of pixels without a range, or made to take long: a JPEG of
            more than 100 scans, or headers in millions of pieces.
        MachineError: the memory does not suffice.
    """
    formats = [name for name in known_formats() if name in decoding.formats]
    mode = _MODES.get(decoding.channels)
    if mode is None:
        raise DataError(f"{where}: an image has 1 or 3 channels, the model {decoding.channels}")
    with _told(where, formats), _opened(file, where, formats) as image:
        width, height = image.size
        admit(width * height)
        if width * height > decoding.max_pixels:
            raise DataError(
                f"{where}: {width} x {height} pixels exceed the limit of {decoding.max_pixels}"
            )
        if height > _MOST_ROWS:
            raise DataError(
                f"{where}: {height} rows exceed the limit of {_MOST_ROWS}; cut it into pieces"
            )
        with _large_images if width * height > _LARGE else nullcontext():
            image.load()
            pixels = np.asarray(_in_mode(mode, _scaled(_upright(image, where, mode), decoding)))
    pixels_HWC = pixels.reshape(decoding.size, decoding.size, decoding.channels)
    return DecodedImage(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)), (width, height))


@contextmanager
def _told(where: str, formats: list[str]) -> Iterator[None]:
    """Say in one line what is wrong with the image that the block reads."""
    try:
        yield
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


@contextmanager
def _no_warnings() -> Iterator[None]:
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _opened(file: BinaryIO, where: str, formats: list[str]) -> Image.Image:
    pieces = Pieces(file, where)
    with _no_warnings():
        image = Image.open(cast("BinaryIO", pieces), formats=formats)
    if image.format in ("JPEG", "MPO"):
        require_few_scans(pieces, where)
    return image


def _upright(image: Image.Image, where: str, mode: str) -> Image.Image:
    """Return a loaded image turned as a camera noted, in ``mode`` or, if it is grey, in L."""
    if image.mode.startswith(("I", "F")):
        return upright(image, _orientation(image), "L", _eight_bits(image, where))
    seen = "L" if image.mode in _GREY else mode
    return upright(image, _orientation(image), seen, lambda part: _in_mode(seen, part))


def _in_mode(mode: str, image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # which Pillow warns about if it is not asked for
    if image.mode not in (mode, "RGB"):
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none; damaged metadata spoil no image."""
    with _no_warnings():
        try:  # of a TIFF, Pillow has applied it on loading and says 1
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
        except _DAMAGE:
            return 1


def _eight_bits(image: Image.Image, where: str) -> Callable[[Image.Image], Image.Image]:
    """Return what makes grey of up to 16 bits 8; Pillow's own conversion clips at 255."""
    tags = getattr(image, "tag_v2", None)
    if image.mode == "F" or (image.mode == "I" and tags):
        raise DataError(f"{where}: 32-bit or signed pixels have no known range; save 8 or 16 bits")
    most = 2 ** (tags[ExifTags.Base.BitsPerSample][0] if tags else 16) - 1
    white_is_zero = tags and tags.get(ExifTags.Base.PhotometricInterpretation) == 0

    def converted(part: Image.Image) -> Image.Image:
        grey = (np.asarray(part).astype(np.uint32) * 255 + most // 2) // most
        return Image.fromarray((255 - grey if white_is_zero else grey).astype(np.uint8))

    return converted


def _scaled(image: Image.Image, decoding: Decoding) -> Image.Image:
    """Return the central square, scaled from its box: memory follows the result."""
    size = decoding.size
    if image.size == (size, size):
        return image
    side = min(image.size) * size / decoding.shorter_side
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)

"""An image file becomes what the model takes; whatever it holds, a DataError at worst."""

import struct
import threading
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from advmoe_deploy.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
MAX_PIXELS = 64_000_000

# What Pillow's decoders are known to raise on damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_ORIENTATION_TAG = 0x0112
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
    """``pixels`` is float32 [C, H, W] in [0, 1]; ``original`` the (width, height) of the file."""

    pixels: NDArray[np.float32]
    original: tuple[int, int]


def decode_image(path: Path, shape: tuple[int, int, int]) -> DecodedImage:
    """Return the image at ``path`` with the channels and the size of ``shape`` = (C, H, W).

    One channel is luminance, three are RGB; transparency is dropped; the orientation that a camera
    noted is applied; another size is resized bilinearly, whatever its proportions.

    Raises:
        DataError: no PNG, JPEG, WEBP or BMP, damaged, truncated, or above ``MAX_PIXELS``.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        with _open(path) as image:
            return _convert(image, path, shape)
    except PermissionError:
        raise DataError(f"{path}: permission denied") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: damaged image: {reason}") from None


def _open(path: Path) -> Image.Image:
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path, formats=FORMATS)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none; damaged metadata spoil no image."""
    if "exif" not in image.info:
        return 1
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
        except _DAMAGE:
            return 1


def _convert(image: Image.Image, path: Path, shape: tuple[int, int, int]) -> DecodedImage:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{path}: {width} x {height} pixels exceed the limit of {MAX_PIXELS}")
    channels, rows, columns = shape
    turn = _UPRIGHT.get(_orientation(image))
    plain = _eight_bits(image).convert("L" if channels == 1 else "RGB")
    if turn is not None:
        plain = plain.transpose(turn)
    if plain.size != (columns, rows):
        plain = plain.resize((columns, rows), Image.Resampling.BILINEAR)
    pixels_HWC = np.asarray(plain, dtype=np.float32).reshape(rows, columns, channels) / 255
    return DecodedImage(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)), (width, height))


def _eight_bits(image: Image.Image) -> Image.Image:
    # Pillow's own conversion of 16-bit grey to L clips at 255 instead of scaling.
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # which Pillow warns about if it is not asked for
    if not image.mode.startswith("I"):
        return image
    grey = np.asarray(image, dtype=np.float64)
    return Image.fromarray(np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8))

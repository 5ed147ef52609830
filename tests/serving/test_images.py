"""Images of every kind become what the model takes; damaged ones become one line."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.decode import decode_file, known_formats
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError
from tests.data.packed import png, png_chunk

GREY = Decoding.of(8, channels=1)
COLOUR = Decoding.of(8)


def unit_pixels(path: Path, decoding: Decoding) -> np.ndarray:
    """Return what the model sees: float32 in [0, 1]."""
    return to_float(decode_file(path, decoding).pixels)


def test_grey_pixels_arrive_exactly(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    (tmp_path / "a.png").write_bytes(png(pixels))
    decoded = decode_file(tmp_path / "a.png", GREY)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.original == (8, 8)
    np.testing.assert_array_equal(decoded.pixels, pixels[None])


def test_colour_is_channels_first(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (255, 0, 51)).save(tmp_path / "a.bmp")
    pixels = unit_pixels(tmp_path / "a.bmp", COLOUR)
    assert pixels.shape == (3, 8, 8)
    np.testing.assert_allclose(pixels[:, 0, 0], [1.0, 0.0, 0.2])


def test_grey_files_feed_a_colour_model_and_the_reverse(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 51).save(tmp_path / "grey.png")
    np.testing.assert_allclose(unit_pixels(tmp_path / "grey.png", COLOUR), 0.2)
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    np.testing.assert_allclose(unit_pixels(tmp_path / "clear.png", GREY), 1.0)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 257 * 51, dtype=np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_allclose(unit_pixels(tmp_path / "deep.png", GREY), 0.2)


def test_a_palette_with_transparency_is_read(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 51, 51, 51])
    image.save(tmp_path / "a.png", transparency=b"\x80\x00")
    for decoding in (GREY, COLOUR):
        np.testing.assert_allclose(unit_pixels(tmp_path / "a.png", decoding), 0.2)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_other_sizes_are_resized(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("L", (20, 10), 200).convert("RGB").save(path)
    decoded = decode_file(path, COLOUR)
    assert decoded.original == (20, 10)
    np.testing.assert_allclose(to_float(decoded.pixels), 200 / 255, atol=0.02)


def test_the_orientation_a_camera_noted_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    for orientation, (row, column) in {1: (0, 3), 3: (7, 3), 6: (3, 7), 8: (3, 0)}.items():
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        assert unit_pixels(tmp_path / "a.png", GREY)[0, row, column] == 1.0


def bomb() -> bytes:
    """Return a PNG of a few bytes that claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    idat = png_chunk(b"IDAT", zlib.compress(b"\0"))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + idat + png_chunk(b"IEND", b"")


def test_bad_files_become_one_line(tmp_path: Path) -> None:
    whole = png(np.zeros((64, 64), dtype=np.uint8))
    bad = {
        "text.png": b"This is text.\n",
        "empty.png": b"",
        "truncated.png": whole[: len(whole) // 2],
        "bomb.png": bomb(),
        "gif.png": b"GIF89a\x01\x00\x01\x00\x00\x00\x00;",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as caught:
            decode_file(tmp_path / name, GREY)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_pixel_cap_holds_below_pillows_own(tmp_path: Path) -> None:
    Image.new("L", (9, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="9 x 8 pixels exceed the limit of 71"):
        decode_file(tmp_path / "a.png", GREY.model_copy(update={"max_pixels": 71}))
    assert GREY.max_pixels < Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("kind", known_formats())
def test_random_damage_never_raises_anything_else(tmp_path: Path, kind: str) -> None:
    random.seed(0)
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    # Some writers refuse damaged metadata.
    metadata = {} if kind in ("AVIF", "TIFF") else {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}
    Image.fromarray(noise).save(buffer, kind, **metadata)
    path = tmp_path / "a.png"
    for _ in range(150):
        damaged = bytearray(buffer.getvalue())
        for _ in range(random.randint(1, 8)):
            damaged[random.randrange(min(len(damaged), 200))] = random.randrange(256)
        path.write_bytes(
            damaged[: random.randint(1, len(damaged))] if random.random() < 0.3 else damaged
        )
        try:
            decoded = decode_file(path, COLOUR)
        except DataError:
            continue
        assert decoded.pixels.shape == (3, 8, 8)

"""Large images: the same pixels as in one piece, and memory that follows the target."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from advmoe_deploy.data import upright
from advmoe_deploy.data.decode import decode
from advmoe_deploy.decoding import Decoding

FOUR_AT_ONCE = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from advmoe_deploy.data.decode import decode_file
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError

folder, target = Path(sys.argv[1]), Decoding.of(224)
decode_file(folder / "small.png", target)
begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in ("deep.png", "wide.png", "tall.png", "grey.png", "high.png"):
    try:
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda _: decode_file(folder / name, target).pixels, range(4))
            said = [int(pixels.max()) for pixels in found]
    except DataError as error:
        said = error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun
    print(name, peak // 1024, said)
"""


def black_png(width: int, height: int, bits: int) -> bytes:
    """Return a black grey PNG that never was an image in memory."""
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    packer, row = zlib.compressobj(1), bytes(width * bits // 8 + 1)
    together = max(1, (1 << 20) // len(row))
    rows = b"".join(packer.compress(row * together) for _ in range(height // together))
    rows += packer.compress(row * (height % together)) + packer.flush()
    parts = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_images_at_the_pixel_limit_take_no_gigabytes(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    (tmp_path / "deep.png").write_bytes(black_png(8000, 8000, 16))
    (tmp_path / "wide.png").write_bytes(black_png(64_000_000, 1, 16))
    (tmp_path / "tall.png").write_bytes(black_png(1, 64_000_000, 16))
    (tmp_path / "grey.png").write_bytes(black_png(8000, 8000, 8))
    (tmp_path / "high.png").write_bytes(black_png(16, 4_000_000, 8))
    ran = subprocess.run(
        [sys.executable, "-c", FOUR_AT_ONCE, str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=300,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    said = {line.split()[0]: line.split(maxsplit=2)[1:] for line in ran.stdout.splitlines()}
    limit = (
        f"{tmp_path / 'tall.png'}: 64000000 rows exceed the limit of 4194304; cut it into pieces"
    )
    assert said.pop("tall.png")[1] == limit
    assert {text for _, text in said.values()} <= {"[0, 0, 0, 0]"}
    pixels_mib = 2 * 64_000_000 / (1 << 20)  # of one image, 16 bits each, as it is decoded
    peaks = {name: int(peak) for name, (peak, _) in said.items()}
    assert max(peaks.values()) < 2 * pixels_mib + 128, peaks


def noise(mode: str, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(len(mode) + width)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65_536, (height, width), dtype=np.uint16))
    colour = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    return colour.quantize(16) if mode == "P" else colour.convert(mode)


def file_of(mode: str, width: int, height: int, orientation: int) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    kind = {"CMYK": "JPEG", "LAB": "TIFF"}.get(mode, "PNG")
    noise(mode, width, height).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def in_one_piece(data: bytes, decoding: Decoding) -> np.ndarray:
    """Return the pixels as the rule has them: converted, turned, and cut and scaled at once."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        exif = image.getexif()
        if image.mode.startswith("I"):
            deep = np.asarray(image).astype(np.uint32)
            image = Image.fromarray(((deep * 255 + 32_767) // 65_535).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        image = image if decoding.channels == 1 and image.mode == "L" else image.convert("RGB")
        image = image.convert("L" if decoding.channels == 1 else "RGB")
        image.info["exif"] = exif.tobytes()
        image = ImageOps.exif_transpose(image)
    size = (decoding.size, decoding.size)
    if image.size != size:
        side = min(image.size) * decoding.size / decoding.shorter_side
        left, top = ((length - side) / 2 for length in image.size)
        box = (left, top, left + side, top + side)
        image = image.resize(size, Image.Resampling.BILINEAR, box=box)
    return np.asarray(image).reshape(*size, decoding.channels).transpose(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "LAB"])
def test_bands_give_the_pixels_of_one_piece(
    mode: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = Decoding(size=10, channels=channels, shorter_side=13)
    turns = [1] if mode in ("CMYK", "LAB") else range(1, 9)
    for width, height in ((23, 40), (61, 10), (10, 35), (10, 10), (7, 9), (1, 150), (230, 3)):
        for orientation in turns:
            data = file_of(mode, width, height, orientation)
            whole = in_one_piece(data, decoding)
            for at_once in (100, 1 << 22):
                monkeypatch.setattr(upright, "PIXELS_AT_ONCE", at_once)
                found = decode(io.BytesIO(data), "it", decoding).pixels
                assert np.array_equal(whole, found), (width, height, orientation, at_once)


@pytest.mark.parametrize("size", [(3000, 1800), (1500, 4000), (70_000, 90), (60, 80_000)])
@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_real_sizes_have_the_pixels_of_one_piece(mode: str, size: tuple[int, int]) -> None:
    assert size[0] * size[1] > upright.PIXELS_AT_ONCE
    data = file_of(mode, *size, orientation=1)
    for decoding in (
        Decoding.of(224),
        Decoding.of(32),
        Decoding(size=96, channels=1, shorter_side=107),
    ):
        found = decode(io.BytesIO(data), "it", decoding).pixels
        assert np.array_equal(in_one_piece(data, decoding), found), decoding

"""One decoder: what each kind of image file becomes, and that everybody reads the same."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from advmoe_deploy.data import pixels
from advmoe_deploy.data.decode import decode, decode_file, known_formats
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.decoding import IMAGE_FORMATS, IMAGE_SUFFIXES, Decoding
from advmoe_deploy.errors import DataError
from advmoe_deploy.specs import ModelSpec
from tests.data.packed import png_chunk

BARS = np.zeros((8, 24, 3), np.uint8)  # black, white in the middle, black
BARS[:, 8:16] = 255
# The Transpose that stores an upright image so that its EXIF orientation turns it back.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(data: bytes, size: int = 8, channels: int = 3) -> np.ndarray:
    return decode(io.BytesIO(data), "it", Decoding.of(size, channels)).pixels


def grey_levels(data: bytes) -> list[int]:
    """Return the one level of each channel of a plain image."""
    found = read(data)
    assert found.min(axis=(1, 2)).tolist() == found.max(axis=(1, 2)).tolist()
    return found[:, 0, 0].tolist()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("image", [BARS, BARS.transpose(1, 0, 2)], ids=["wide", "tall"])
def test_the_central_square_is_cut_out_and_not_squashed(image: np.ndarray) -> None:
    assert read(encoded(Image.fromarray(image), "PNG")).min() == 255


def test_above_64_pixels_the_cut_is_seven_eighths_of_the_shorter_side() -> None:
    assert Decoding.of(224).shorter_side == 256
    assert Decoding.of(64).shorter_side == 64
    framed = np.zeros((256, 256, 3), np.uint8)
    framed[16:240, 16:240] = np.asarray(noise(224, 224))
    middle = read(encoded(Image.fromarray(framed), "PNG"), size=224)
    assert np.array_equal(middle.transpose(1, 2, 0), framed[16:240, 16:240])


def test_an_image_of_the_models_size_is_taken_as_it_is() -> None:
    whole = noise(224, 224)
    assert np.array_equal(read(encoded(whole, "PNG"), 224).transpose(1, 2, 0), np.asarray(whole))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_gives_the_upright_pixels(orientation: int, kind: str) -> None:
    upright, turn, exif = noise(20, 31), STORED[orientation], Image.Exif()
    stored = upright if turn is None else upright.transpose(turn)
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(stored, kind, exif=exif, **options)
    assert np.array_equal(read(data), read(encoded(upright, "PNG")))


def test_damaged_metadata_spoil_no_image() -> None:
    data = encoded(noise(8, 8), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    assert np.array_equal(read(data), read(encoded(noise(8, 8), "PNG")))


def colour_png_of_16_bits(level: int) -> bytes:
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + struct.pack(">24H", *[level] * 24) for _ in range(8))
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def grey_tiff(values: bytes, bits: int, photometric: int = 1) -> bytes:
    """Return a little-endian TIFF of 8 x 8 pixels, ``photometric`` 0 if white is zero."""
    fields = [(256, 8), (257, 8), (258, bits), (259, 1), (262, photometric)]
    fields += [(273, 8), (277, 1), (278, 8), (279, len(values))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(values))
    return start + values + struct.pack("<H", len(fields)) + entries + bytes(4)


def test_more_than_eight_bits_are_scaled() -> None:
    sixteen = np.full((8, 8), 20_000, np.uint16)  # 20,000 / 257 = 77.8
    white_is_zero = (65_535 - sixteen).astype("<u2").tobytes()
    twelve = bytes.fromhex("4e24e2") * 32  # two pixels of 1,250 of 4,095: 77.8 of 255 again
    files = {
        "PNG": encoded(Image.fromarray(sixteen), "PNG"),
        "colour PNG": colour_png_of_16_bits(20_000),
        "TIFF": encoded(Image.fromarray(sixteen), "TIFF"),
        "big-endian TIFF": encoded(Image.fromarray(sixteen.astype(">u2")), "TIFF"),
        "TIFF, white is zero": grey_tiff(white_is_zero, 16, photometric=0),
        "TIFF of 12 bits": grey_tiff(twelve, 12),
        "PGM": b"P5 8 8 65535 " + sixteen.astype(">u2").tobytes(),
        "PGM of 12 bits": b"P5 8 8 4095 " + np.full(64, 1250, ">u2").tobytes(),
    }
    for name, data in files.items():
        assert grey_levels(data) == [78, 78, 78], name


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_range_are_refused(dtype: type) -> None:
    with pytest.raises(DataError, match=r"it: .* no known range; save 8 or 16 bits"):
        read(encoded(Image.fromarray(np.ones((8, 8), dtype)), "TIFF"))


def test_transparency_is_dropped_however_it_is_written() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 255, 51, 0))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 255, 51])
    grey = Image.new("LA", (8, 8), (51, 0))
    assert grey_levels(encoded(clear, "PNG")) == [0, 255, 51]
    assert grey_levels(encoded(clear, "TIFF")) == [0, 255, 51]
    for transparency in (1, b"\x80\x00"):
        assert grey_levels(encoded(palette, "PNG", transparency=transparency)) == [0, 255, 51]
    assert grey_levels(encoded(palette, "GIF", transparency=1)) == [0, 255, 51]
    assert grey_levels(encoded(grey, "PNG")) == [51, 51, 51]


def test_cmyk_is_read_with_and_without_adobes_marker() -> None:
    marked = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 51)), "JPEG", quality=100)
    start = marked.index(b"\xff\xee")
    length = int.from_bytes(marked[start + 2 : start + 4], "big")
    plain = marked[:start] + marked[start + 2 + length :]
    for data in (marked, plain):
        assert np.allclose(grey_levels(data), [204, 0, 0], atol=2)


def test_lab_is_converted() -> None:
    red, green, blue = grey_levels(encoded(Image.new("LAB", (8, 8), (128, 128, 128)), "TIFF"))
    assert red == green == blue == pytest.approx(119, abs=2)  # L* of 50 is grey 119


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert grey_levels(data) == [0, 0, 0]


def test_one_channel_is_luminance() -> None:
    colour = encoded(Image.new("RGB", (8, 8), (255, 0, 0)), "PNG")
    assert np.unique(read(colour, channels=1)).tolist() == [76]  # 0.299 x 255
    assert read(encoded(Image.new("1", (8, 8), 1), "PNG"), channels=1).min() == 255
    with pytest.raises(DataError, match="1 or 3 channels, the model 4"):
        read(colour, channels=4)


@pytest.mark.parametrize("kind", known_formats())
def test_every_format_is_found_and_read(tmp_path: Path, kind: str) -> None:
    for suffix in IMAGE_FORMATS[kind]:
        (tmp_path / f"a{suffix}").write_bytes(encoded(Image.new("RGB", (20, 10), "white"), kind))
        assert suffix in IMAGE_SUFFIXES
        assert decode_file(tmp_path / f"a{suffix}", Decoding.of(8)).pixels.min() >= 250


def test_what_runs_other_programs_is_no_image(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: not a PNG, .* or \w+ image"):
        decode_file(tmp_path / "a.png", Decoding.of(8))


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from advmoe_deploy.data.decode import decode_file
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import MachineError

folder, size = Path(sys.argv[1]), Decoding.of(224)
decode_file(folder / "small.png", size)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
print([decode_file(folder / name, size).pixels.shape for name in ("strip.png", "panorama.png")])
try:
    decode_file(folder / "large.png", size)
except MachineError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited through Linux's /proc")
def test_memory_follows_the_target_and_the_file(tmp_path: Path) -> None:
    sizes = {"small": (8, 8), "strip": (1, 60_000), "panorama": (40_000, 48), "large": (7000, 7000)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    command = [sys.executable, "-c", LITTLE_MEMORY, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    shapes, error = ran.stdout.splitlines()
    assert shapes == "[(3, 224, 224), (3, 224, 224)]"
    assert error == f"{tmp_path / 'large.png'}: not enough memory to decode it; leave it out"


def test_parameters_travel_as_json_and_unknown_rules_are_refused() -> None:
    decoding = Decoding.of(224)
    assert Decoding.model_validate_json(decoding.model_dump_json()) == decoding
    fields = json.loads(decoding.model_dump_json())
    for change in ({"transparency": "white"}, {"rule": 2}, {"formats": ["EPS"]}, {"size": 300}):
        with pytest.raises(ValidationError):
            Decoding.model_validate({**fields, **change})


def test_a_large_split_is_cached_by_its_decoding_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [(split, label) for split in ("train", "val") for label in ("a", "b")]
    for number, (split, label) in enumerate(folders):
        (tmp_path / split / label).mkdir(parents=True)
        for index in range(3):  # no two alike: splits share no image
            image = noise(20, 30, seed=3 * number + index)
            image.save(tmp_path / split / label / f"{index}.png")
    monkeypatch.setenv("ADVMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pixels, "IN_MEMORY_BYTES", 0)
    source, closer = f"folder:{tmp_path}?size=8", Decoding(size=8, channels=3, shorter_side=12)
    default = load_dataset(source).test.images
    assert np.array_equal(load_dataset(source, Decoding.of(8)).test.images, default)
    assert not np.array_equal(load_dataset(source, closer).test.images, default)
    assert load_dataset(source, Decoding.of(8, channels=1)).image_shape == (1, 8, 8)


def test_a_model_takes_what_its_decoding_gives(tiny_run: Path) -> None:
    from advmoe_deploy.models.checkpoint import CHECKPOINT, Checkpoint, read_checkpoint

    grey = Decoding.of(8, channels=1)
    assert read_checkpoint(tiny_run / "model").decoding == grey
    fields = json.loads((tiny_run / "model" / CHECKPOINT).read_text())
    assert fields.pop("decoding") == grey.model_dump(mode="json")
    before = Checkpoint.model_validate(fields)  # as written before there was the field
    assert before.decoding == grey
    assert isinstance(before.model, ModelSpec)
    with pytest.raises(ValidationError, match=r"gives images \(3, 8, 8\), the model takes"):
        Checkpoint.model_validate({**fields, "decoding": Decoding.of(8).model_dump()})

"""Files that are small and would take minutes to decode are refused at once."""

import io
import struct
import zlib

import pytest
from PIL import Image

from advmoe_deploy.data.decode import decode, head_of
from advmoe_deploy.data.effort import MOST_SCANS
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError

DECODING = Decoding.of(32)
SIZE = 1 << 19


def encoded(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (90, 160, 20)).save(file, kind, **options)
    return file.getvalue()


def scans(more: int) -> bytes:
    """A progressive JPEG whose last scan is there ``more`` times again."""
    jpeg = encoded("JPEG", progressive=True)
    end, start = len(jpeg) - 2, jpeg.rindex(b"\xff\xc4")  # the last table, and its scan
    return jpeg[:end] + more * jpeg[start:end] + jpeg[end:]


def test_a_jpeg_of_too_many_scans_is_refused() -> None:
    own = scans(0).count(b"\xff\xda")
    allowed = scans(MOST_SCANS - own)
    assert decode(io.BytesIO(allowed), "x", DECODING).pixels.shape == (3, 32, 32)
    for more in (MOST_SCANS - own + 1, 5000):
        with pytest.raises(DataError, match="x: a JPEG of more than 100 scans; save it as"):
            decode(io.BytesIO(scans(more)), "x", DECODING)


def test_a_length_that_libjpeg_does_not_read_hides_no_scans() -> None:
    jpeg = encoded("JPEG", progressive=True)
    first = jpeg.index(b"\xff\xda")
    scan = jpeg[first : first + 2 + int.from_bytes(jpeg[first + 2 : first + 4], "big")]
    restarts, reserved = b"\xff\xdd\x00\x04\x00\x01", b"\xff\x02\xff\xff"
    for more in (3, 3000):  # the few show that libjpeg does take it for an image
        file = io.BytesIO(jpeg[:first] + restarts + scan + reserved + more * scan + b"\xff\xd9")
        if more < MOST_SCANS:
            assert decode(file, "x", DECODING).original == (32, 32)
        else:
            with pytest.raises(DataError, match="100 scans"):
                decode(file, "x", DECODING)


def test_what_only_looks_like_a_scan_does_not_count() -> None:
    looks = b"\xff\xda" * 5000
    jpeg = encoded("JPEG", comment=looks) + looks  # in a segment, and behind the image's end
    assert decode(io.BytesIO(jpeg), "x", DECODING).original == (32, 32)


def test_scans_are_counted_wherever_the_file_is_read_in_two() -> None:
    jpeg = scans(MOST_SCANS)
    for length in range(4080, 4100):
        with pytest.raises(DataError, match="100 scans"):
            decode(io.BytesIO(jpeg[:2] + b"\xff" * length + jpeg[2:]), "x", DECODING)


def chunk(kind: bytes) -> bytes:
    return struct.pack(">I", 0) + kind + struct.pack(">I", zlib.crc32(kind))


JPEG, PNG, GIF = encoded("JPEG"), encoded("PNG"), encoded("GIF")
FIRST = GIF.index(b"\x2c")  # where a GIF's image begins


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(JPEG[:2] + b"\xff\xfe\x00\x02" * (SIZE // 4) + JPEG[2:], id="comments"),
        pytest.param(JPEG[:2] + b"\xff" * SIZE + JPEG[2:], id="fill"),
        pytest.param(JPEG[:-2] + b"\xff\xfe\x00\x02" * (SIZE // 4) + JPEG[-2:], id="behind"),
        pytest.param(PNG[:33] + chunk(b"abCd") * (SIZE // 12) + PNG[33:], id="chunks"),
        pytest.param(b"P6\n#" + b"a" * SIZE + b"\n32 32 255\n" + bytes(3072), id="letters"),
        pytest.param(GIF[:FIRST] + b"\x21\xfe\x00" * (SIZE // 3) + GIF[FIRST:], id="extensions"),
    ],
)
def test_headers_of_tiny_pieces_are_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="x: damaged image: it is all headers, in tiny pieces"):
        decode(io.BytesIO(content), "x", DECODING)


def test_the_head_alone_is_bounded_too() -> None:
    with pytest.raises(DataError, match="tiny pieces"):
        head_of(JPEG[:2] + b"\xff" * SIZE + JPEG[2:], "x")

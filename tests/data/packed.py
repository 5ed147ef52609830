"""Tar shards and parquet files of images, as tests write them."""

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
from PIL import Image

from advmoe_deploy.data.registry import load_dataset


def digits(count: int) -> list[bytes]:
    """Return the first test digits as PNG files."""
    return [png(image[0]) for image in load_dataset("digits").test.images[:count]]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, link
    return header


def write_tar(path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            header = member(name) if isinstance(name, str) else name
            header.size = len(content)
            shard.addfile(header, io.BytesIO(content))
    return path


def write_table(path: Path, images: Iterable[bytes | None], rows_per_group: int = 100) -> Path:
    """Write a table as the Hugging Face hub has it."""
    rows = [
        {"image": None if each is None else {"bytes": each, "path": f"{i}.png"}, "label": i % 10}
        for i, each in enumerate(images)
    ]
    struct = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    schema = arrow.schema([("image", struct), ("label", arrow.int64())])
    table = arrow.Table.from_pylist(rows, schema=schema)
    parquet.write_table(table, path, row_group_size=rows_per_group)
    return path

"""Thirty images in every layout that is read, twenty to train on and ten to test on."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.images import pixels, png, write_png, write_table

TRAIN, TEST = range(20), range(20, 30)


def tables(root: Path) -> None:
    write_table(root / "train-00000-of-00002.parquet", TRAIN[:12])
    write_table(root / "train-00001-of-00002.parquet", TRAIN[12:])
    write_table(root / "test-00000-of-00001.parquet", TEST)


def converted(root: Path) -> None:
    for split, numbers in (("train", TRAIN), ("test", TEST)):
        write_table(root / "plain_text" / split / "0000.parquet", numbers)


def plain_files_and_other_columns(root: Path) -> None:
    write_table(root / "train.parquet", TRAIN, image="image", label="labels")
    write_table(root / "validation.parquet", TEST, image="image", label="fine_label")


def arrow_files(root: Path) -> None:
    for split, numbers in (("train", TRAIN), ("test", TEST)):
        write_table(root / "t.parquet", numbers)
        table = pq.read_table(root / "t.parquet")
        (root / split).mkdir()
        with pa.ipc.new_stream(root / split / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table)
    (root / "t.parquet").unlink()


def batches(numbers: range) -> dict[object, object]:
    rows = [pixels(number).transpose(2, 0, 1).reshape(-1) for number in numbers]
    return {b"data": np.stack(rows), b"labels": [number % 10 for number in numbers]}


def python_batches(root: Path, protocol: int = 2) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for index in range(5):
        file = folder / f"data_batch_{index + 1}"
        file.write_bytes(pickle.dumps(batches(TRAIN[4 * index : 4 * index + 4]), protocol))
    (folder / "test_batch").write_bytes(pickle.dumps(batches(TEST), protocol))


def newer_python_batches(root: Path) -> None:
    python_batches(root, protocol=5)


def binary_batches(root: Path) -> None:
    def write(name: str, numbers: range) -> None:
        rows = [bytes([n % 10]) + pixels(n).transpose(2, 0, 1).tobytes() for n in numbers]
        (root / name).write_bytes(b"".join(rows))

    for index in range(5):
        write(f"data_batch_{index + 1}.bin", TRAIN[4 * index : 4 * index + 4])
    write("test_batch.bin", TEST)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_shard(file: Path, numbers: range, *, described: bool = False) -> None:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for number in numbers:
            add(tar, f"./{number:06}.png", png(number))
            if described:
                add(tar, f"./{number:06}.json", json.dumps({"label": number % 10}).encode())
            else:
                add(tar, f"./{number:06}.cls", str(number % 10).encode())


def shards(root: Path) -> None:
    write_shard(root / "train-000000.tar", TRAIN[:10])
    write_shard(root / "train-000001.tar", TRAIN[10:])
    write_shard(root / "test-000000.tar", TEST)


def shards_in_folders(root: Path) -> None:
    write_shard(root / "train" / "train-000000.tar", TRAIN, described=True)
    write_shard(root / "val" / "val-000000.tar", TEST, described=True)


def class_folders(root: Path) -> None:
    for split, numbers in (("train", TRAIN), ("Val", TEST)):
        for number in numbers:
            write_png(root / split / f"class-{number % 10}" / f"{number}.png", number)


def annotated(root: Path) -> None:
    """Tiny-ImageNet's archive: images one folder deeper, the test images without labels."""
    lines = []
    for number in TRAIN:
        name = f"class-{number % 10}"
        write_png(root / "train" / name / "images" / f"{number}.png", number)
        (root / "train" / name / "boxes.txt").write_text("0 0 1 1")
    for number in TEST:
        write_png(root / "val" / "images" / f"val_{number}.png", number)
        lines.append(f"val_{number}.png\tclass-{number % 10}\t0\t0\t62\t62\r\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines), newline="")
    write_png(root / "test" / "images" / "test_0.png", 99)


LAYOUTS = (
    tables,
    converted,
    plain_files_and_other_columns,
    arrow_files,
    python_batches,
    newer_python_batches,
    binary_batches,
    shards,
    shards_in_folders,
    class_folders,
    annotated,
)

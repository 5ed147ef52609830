"""Data sets as people have them on disk: read, or one line that says what to do."""

import io
import json
import logging
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from advmoe_deploy.data.layouts.tables import encoded_in
from advmoe_deploy.data.registry import load_dataset, load_test_split
from advmoe_deploy.errors import DataError
from tests.data.images import pixels, png, write_folders, write_png, write_table
from tests.data.layouts import (
    LAYOUTS,
    TEST,
    TRAIN,
    add,
    annotated,
    batches,
    python_batches,
    shards,
    tables,
)


@pytest.mark.parametrize("write", LAYOUTS)
@pytest.mark.parametrize("source", ["cifar10:{}", "folder:{}?size=32"])
def test_a_layout_is_read_with_its_labels(
    tmp_path: Path, source: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path)
    data = load_dataset(source.format(tmp_path))
    sizes = (len(data.train), len(data.holdout), len(data.test))
    assert sizes == (16, 4, 10)
    learned = {
        image.tobytes(): label
        for split in (data.train, data.holdout)
        for image, label in zip(split.images, split.labels.tolist(), strict=True)
    }
    assert learned == {pixels(n).transpose(2, 0, 1).tobytes(): n % 10 for n in TRAIN}
    for image, label in zip(data.test.images, data.test.labels, strict=True):
        assert np.array_equal(image.transpose(1, 2, 0), pixels(20 + label))


@pytest.mark.parametrize("write", LAYOUTS)
@pytest.mark.parametrize("source", ["cifar10:{}", "folder:{}?size=32"])
def test_test_images_are_read_where_there_are_no_others(
    tmp_path: Path, source: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path)
    for path in [*tmp_path.rglob("*train*"), *tmp_path.rglob("data_batch*")]:
        if path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if write is annotated:  # its classes are the folders of the training images
        with pytest.raises(DataError, match="holds 1 class folder"):
            load_test_split(source.format(tmp_path))
        return
    split = load_test_split(source.format(tmp_path))
    assert sorted(split.labels.tolist()) == list(range(10))
    for image, label in zip(split.images, split.labels.tolist(), strict=True):
        assert np.array_equal(image.transpose(1, 2, 0), pixels(20 + label))
    with pytest.raises(DataError):
        load_dataset(source.format(tmp_path))


def test_test_images_alone_are_those_of_the_data_set() -> None:
    one, other = load_test_split("digits"), load_dataset("digits").test
    np.testing.assert_array_equal(one.images, other.images)


def test_the_content_is_the_same_in_every_layout(tmp_path: Path) -> None:
    found = set()
    for write in LAYOUTS:
        root = tmp_path / write.__name__
        root.mkdir()
        write(root)
        fingerprint = load_dataset(f"cifar10:{root}").fingerprint
        assert fingerprint is not None
        found.add(fingerprint.images)
    assert len(found) == 1


@pytest.mark.parametrize("size", [64, 32])
def test_batches_are_scaled_where_another_size_is_asked_for(tmp_path: Path, size: int) -> None:
    python_batches(tmp_path)
    assert load_dataset(f"folder:{tmp_path}?size={size}").image_shape == (3, size, size)


def test_a_shard_is_never_unpacked(tmp_path: Path) -> None:
    shards(tmp_path)
    with tarfile.open(tmp_path / "test-000000.tar", "a") as tar:
        add(tar, "../../escaped.png", png(77))
        add(tar, "../../escaped.cls", b"7")
        link = tarfile.TarInfo("000099.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    # Its folder is called "..": hidden, as is every member below it.
    assert len(load_dataset(f"cifar10:{tmp_path}").test) == 10
    assert not list(tmp_path.parent.rglob("escaped*"))


def one_line_of(source: str) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_that_are_wrong_are_one_line(tmp_path: Path) -> None:
    shards(tmp_path)
    file = tmp_path / "test-000000.tar"
    with tarfile.open(file, "a") as tar:
        add(tar, "000098.png", png(98))
    assert "000098 has no label" in one_line_of(f"cifar10:{tmp_path}")
    with tarfile.open(file, "w") as tar:
        add(tar, "0.png", png(0))
        add(tar, "0.cls", b"cat")
    assert "no class number; number them from 0" in one_line_of(f"cifar10:{tmp_path}")
    for name, label in (("0.cls", b"9" * 30), ("0.json", b'{"label": "cat"}')):
        with tarfile.open(file, "w") as tar:
            add(tar, "0.png", png(0))
            add(tar, name, label)
        assert "no class number; number them from 0" in one_line_of(f"cifar10:{tmp_path}")
    with tarfile.open(file, "w:gz") as tar:
        add(tar, "0.png", png(0))
    assert "no readable tar file" in one_line_of(f"cifar10:{tmp_path}")


def test_a_table_that_lacks_a_part_or_has_one_twice_is_one_line(tmp_path: Path) -> None:
    tables(tmp_path)
    write_table(tmp_path / "train-00001-of-00002-abc.parquet", TRAIN[12:])
    assert "the same part of a split" in one_line_of(f"cifar10:{tmp_path}")
    for file in tmp_path.glob("train-00001-*"):
        file.unlink()
    assert "is one of 2 parts, and 1 are there" in one_line_of(f"cifar10:{tmp_path}")


def test_batches_that_are_wrong_are_one_line(tmp_path: Path) -> None:
    python_batches(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "test_batch").write_bytes(pickle.dumps({**batches(TEST), b"labels": [1]}))
    assert "1 labels and pixels (10, 3072)" in one_line_of(f"cifar10:{tmp_path}")
    (folder / "test_batch").write_bytes(pickle.dumps({**batches(TEST), b"labels": [9**30] * 10}))
    assert "no list of labels" in one_line_of(f"cifar10:{tmp_path}")
    (folder / "data_batch_3").unlink()
    assert "lacks data_batch_3" in one_line_of(f"cifar10:{tmp_path}")


def test_what_cannot_be_read_says_what_was_found_and_what_to_do(tmp_path: Path) -> None:
    def said(name: str, data: str = "folder:{}?size=32") -> str:
        return one_line_of(data.format(tmp_path / name)).replace(str(tmp_path), "")

    for name in ("a", "b"):
        write_png(tmp_path / "bare" / name / "0.png", 0)
        write_png(tmp_path / "nested" / "it" / "train" / name / "0.png", 0)
        for index in range(4):
            write_png(tmp_path / "flat" / "train" / name / f"{index}.png", index)
            write_png(tmp_path / "no-test" / "train" / name / f"{index}.png", index)
    write_png(tmp_path / "flat" / "val" / "1.png", 1)
    (tmp_path / "packed").mkdir()
    with zipfile.ZipFile(tmp_path / "packed" / "tiny.zip", "w") as archive:
        archive.writestr("train/a/0.png", b"")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.npz").touch()
    assert "no folder train and no folder test, but images below a, b" in said("bare", "cifar10:{}")
    assert "holds it/train/CLASS/; name /nested/it instead" in said("nested")
    assert "holds 1 images such as val/1.png and no class folders; sort them" in said("flat")
    assert "holds a folder train and no folder test or val" in said("no-test", "cifar10:{}")
    assert "holds the archive tiny.zip; unpack it (unzip tiny.zip)" in said("packed")
    assert "packed/tiny.zip is a file; unpack it" in said("packed/tiny.zip")
    assert "but 1 .npz; put images into a folder for each class" in said("other")


def test_hidden_tables_and_shards_are_not_read(tmp_path: Path) -> None:
    tables(tmp_path)
    write_table(tmp_path / ".cache" / "train-00000-of-00001.parquet", range(40, 60))
    (tmp_path / "._test-00000-of-00001.parquet").write_bytes(b"Mac OS X")
    assert len(load_dataset(f"cifar10:{tmp_path}").test) == 10


@pytest.mark.parametrize("main", [None, "aaa"])
def test_one_of_two_revisions_is_read_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, main: str | None
) -> None:
    cache = tmp_path / "datasets--uoft-cs--cifar10"
    for first, revision in ((0, "aaa"), (100, "bbb")):
        folder = cache / "snapshots" / revision / "plain_text"
        write_table(folder / "train-00000-of-00001.parquet", range(first, first + 20))
        write_table(folder / "test-00000-of-00001.parquet", range(first + 20, first + 30))
    if main:
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(f"{main}\n")
    data = load_dataset(f"cifar10:{cache}")
    assert len(data.train) + len(data.holdout) == 20
    chosen, other, first = ("aaa", "bbb", 20) if main else ("bbb", "aaa", 120)
    assert np.array_equal(data.test.images[0].transpose(1, 2, 0), pixels(first))
    (line,) = caplog.messages
    assert f"2 copies of the data; snapshots/{chosen}/plain_text is read" in line
    assert f"snapshots/{other}/plain_text not" in line


def write_named_table(file: Path, numbers: range, names: list[str]) -> None:
    """Write a table whose labels are what the hub's library calls them."""
    write_table(file, numbers)
    told = {"info": {"features": {"label": {"names": names}}}}
    table = pq.read_table(file).replace_schema_metadata({"huggingface": json.dumps(told)})
    pq.write_table(table, file)


def test_tables_that_number_their_classes_otherwise_are_matched_by_name(tmp_path: Path) -> None:
    names = [f"class-{label}" for label in range(10)]
    write_named_table(tmp_path / "train-00000-of-00002.parquet", TRAIN[:10], names)
    write_named_table(tmp_path / "train-00001-of-00002.parquet", TRAIN[10:], names[::-1])
    write_named_table(tmp_path / "test.parquet", TEST, names[::-1])
    data = load_dataset(f"folder:{tmp_path}?size=32")
    labels = {
        image.tobytes(): label
        for split in (data.train, data.holdout, data.test)
        for image, label in zip(split.images, split.labels.tolist(), strict=True)
    }
    expected = [*range(10), *range(9, -1, -1), *range(9, -1, -1)]
    assert [labels[pixels(n).transpose(2, 0, 1).tobytes()] for n in range(30)] == expected
    write_named_table(tmp_path / "test.parquet", TEST, [*names[1:], "class-x"])
    assert "different classes: class-x in the second" in one_line_of(f"folder:{tmp_path}?size=32")


def test_tables_without_a_row_are_one_line(tmp_path: Path) -> None:
    write_table(tmp_path / "train.parquet", range(0))
    write_table(tmp_path / "test.parquet", TEST)
    assert "holds no image" in one_line_of(f"folder:{tmp_path}?size=32")


def test_an_annotation_of_no_image_or_class_is_one_line(tmp_path: Path) -> None:
    annotated(tmp_path)
    file = tmp_path / "val" / "val_annotations.txt"
    lines = file.read_text().splitlines()
    for changed, says in (
        ([*lines, "gone.png\tclass-1"], "line 11"),
        ([lines[0].replace("class-0", "class-x"), *lines[1:]], "line 1"),
        (lines[1:], "names 9 images, and 10 are there"),
    ):
        file.write_text("\n".join(changed))
        assert says in one_line_of(f"folder:{tmp_path}?size=32")
    file.write_text("\n".join(lines))
    write_png(tmp_path / "val" / "more" / lines[0].partition("\t")[0], 98)
    assert "names 10 images, and 11 are there" in one_line_of(f"folder:{tmp_path}?size=32")


def test_a_split_of_classes_that_is_not_read_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_folders(tmp_path / "set")
    for index, name in enumerate("ab"):
        write_png(root / "test" / name / "0.png", 980 + index)
    with caplog.at_level(logging.WARNING):
        data = load_dataset(f"folder:{root}?size=32")
    assert len(data.test) == 6
    assert caplog.messages == [f"{root}: val is the test, and test beside it is not read"]


def test_a_grey_image_in_a_table_is_read_as_colour(tmp_path: Path) -> None:
    tables(tmp_path)
    file = io.BytesIO()
    Image.new("L", (32, 32), 7).save(file, "PNG")
    kind = pa.struct([("bytes", pa.binary())])
    row = pa.array([{"bytes": file.getvalue()}], kind)
    pq.write_table(pa.table({"img": row, "label": [3]}), tmp_path / "test-00000-of-00001.parquet")
    assert (load_dataset(f"cifar10:{tmp_path}").test.images == 7).all()


def test_images_of_more_bytes_than_one_array_holds_are_read() -> None:
    # A row that is nothing, of a file's bytes it claims 1 GiB; two of such arrays are not joined.
    begins = pa.py_buffer(np.array([0, 1 << 30], np.int32))
    data = pa.py_buffer(np.zeros(1 << 30, np.uint8))
    nothing = pa.Array.from_buffers(pa.binary(), 1, [pa.py_buffer(b"\0"), begins, data])
    images = pa.StructArray.from_arrays([nothing], ["bytes"])
    assert encoded_in(pa.chunked_array([images] * 3)) == [None] * 3
    assert encoded_in(pa.chunked_array([nothing] * 3)) == [None] * 3

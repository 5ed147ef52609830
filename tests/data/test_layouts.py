"""Data sets as people have them on disk: read, or one line that says what to do."""

import io
import json
import logging
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from advmoe_deploy.data.layouts import pickles
from advmoe_deploy.data.layouts.pickles import read_pickle
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import DataError
from tests.data.images import pixels, png, write_folders, write_png, write_table

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


def written_by_python_2() -> bytes:
    """A batch of one black image as Python 2 wrote it: names are text, arrays are old strings."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(K\x01M\x00\x0ctcnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T\x00\x0c\x00\x00" + bytes(3072) + b"tb"
    )
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels]K\x07au."


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(written_by_python_2())
    found = read_pickle(tmp_path / "batch")
    assert found["labels"] == [7]
    assert np.array_equal(found["data"], np.zeros((1, 3072), np.uint8))
    assert pickle.loads(written_by_python_2(), encoding="bytes")[b"data"].shape == (1, 3072)


class Runs:
    """Pickles as a call, which an ordinary reader makes."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("function", [os.mkdir, eval, np.load, getattr])
def test_a_pickle_runs_no_code(
    tmp_path: Path, protocol: int, function: Callable[..., object]
) -> None:
    python_batches(tmp_path)
    made = tmp_path / "made"
    argument = {os.mkdir: str(made), eval: f"__import__('os').mkdir({str(made)!r})"}
    call = Runs(function, argument.get(function, "x"), *(["y"] if function is getattr else []))
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(pickle.dumps({**batches(TEST), b"more": call}, protocol))
    with pytest.raises(DataError, match=r"it asks for .*nothing in it was run"):
        load_dataset(f"cifar10:{tmp_path}")
    assert not made.exists()


def test_a_pickle_leaves_the_reader_as_it_was(tmp_path: Path) -> None:
    # BUILD: the attributes of a global become what a dictionary says.
    (tmp_path / "batch").write_bytes(b"\x80\x02c_codecs\nencode\n}U\x03fooK\x05sb0}.")
    assert read_pickle(tmp_path / "batch") == {}
    assert not any(vars(function) for function in (pickles._latin1, pickles._reconstruct))


def test_a_pickle_of_other_arrays_or_a_cut_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "batch"
    for written, says in (
        (pickle.dumps({"data": np.zeros(3, object)}), "not uint8"),
        (pickle.dumps({"data": np.zeros(3)}), "not uint8"),
        (pickle.dumps([1]), "it holds a list"),
        (pickle.dumps(batches(TEST))[:-100], "no pickle"),
        (b"", "no pickle"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x05\x00\x00\x00rot13\x86R.", "by rot13"),
    ):
        file.write_bytes(written)
        with pytest.raises(DataError, match=says):
            read_pickle(file)


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
    def said(name: str) -> str:
        return one_line_of(f"folder:{tmp_path / name}?size=32").replace(str(tmp_path), "")

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
    assert "no folder train and no folder val, but images below a, b" in said("bare")
    assert "holds it/train/CLASS/; name /nested/it instead" in said("nested")
    assert "holds 1 images such as val/1.png and no class folders; sort them" in said("flat")
    assert "holds a folder train and no folder val or valid" in said("no-test")
    assert "holds the archive tiny.zip; unpack it (unzip tiny.zip)" in said("packed")
    assert "packed/tiny.zip is a file; unpack it" in said("packed/tiny.zip")
    assert "but 1 .npz; put images into train/CLASS/ and val/CLASS/" in said("other")


def test_hidden_files_are_no_data_at_any_depth(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_folders(tmp_path / "hidden" / ".inside" / "set")  # the root itself may be hidden
    clean = load_dataset(f"folder:{root}?size=32")
    for split in ("train", "val"):
        write_png(root / split / ".ipynb_checkpoints" / "x.png", 990)
        write_png(root / split / "__MACOSX" / "a" / "x.png", 991)
        write_png(root / split / "a" / "@eaDir" / "0.png" / "THUMB.jpg", 992)
        (root / split / "a" / "._0.png").write_bytes(b"\0\5\x16\7")
        (root / split / ".DS_Store").touch()
        for image in (root / split / "b").glob("*.png"):
            copy = root / split / "b" / ".ipynb_checkpoints" / f"{image.stem}-checkpoint.png"
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(image.read_bytes())
    with caplog.at_level(logging.WARNING):
        found = [load_dataset(f"folder:{root}?size=32") for _ in range(2)]
    assert [data.class_names for data in found] == [("a", "b")] * 2
    assert {data.fingerprint for data in found} == {clean.fingerprint}
    (line,) = caplog.messages  # both times together
    assert line == (f"{root}: 21 hidden files are not read, such as train/.ipynb_checkpoints/x.png")


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


def test_folders_that_are_links_are_followed_once(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "set")
    (root / "train" / "b").rename(tmp_path / "elsewhere")
    (root / "train" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(root / "train" / "b")
    data = load_dataset(f"folder:{root}?size=32")
    assert len(data.train) + len(data.holdout) == 20


def test_links_between_folders_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_folders(tmp_path / "set")
    for name, other in (("a", "b"), ("b", "a")):
        for index in range(4):  # every way through them would be 4 ** 40 folders
            (root / "train" / name / f"link{index}").symlink_to(f"../{other}")
    data = load_dataset(f"folder:{root}?size=32")
    assert len(data.train) + len(data.holdout) == 20
    (line,) = caplog.messages
    assert "train/a/link0 leads to a folder that is read already" in line


def test_a_folder_of_the_system_that_may_not_be_read_is_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folders(tmp_path / "set")
    (root / "lost+found").mkdir()
    scandir = os.scandir

    def refusing(path: str | Path) -> object:
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert load_dataset(f"folder:{root}?size=32").class_names == ("a", "b")


def test_files_that_are_no_images_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_folders(tmp_path / "set")
    (root / "train" / "a" / "photo.heic").touch()
    load_dataset(f"folder:{root}?size=32")
    (line,) = caplog.messages
    assert "1 files below train are no images by their suffix" in line
    assert line.endswith("such as train/a/photo.heic")


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


def test_a_grey_image_in_a_table_is_read_as_colour(tmp_path: Path) -> None:
    tables(tmp_path)
    file = io.BytesIO()
    Image.new("L", (32, 32), 7).save(file, "PNG")
    kind = pa.struct([("bytes", pa.binary())])
    row = pa.array([{"bytes": file.getvalue()}], kind)
    pq.write_table(pa.table({"img": row, "label": [3]}), tmp_path / "test-00000-of-00001.parquet")
    assert (load_dataset(f"cifar10:{tmp_path}").test.images == 7).all()

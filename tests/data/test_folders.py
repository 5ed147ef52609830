"""Hub data sets besides CIFAR-10, and image folders."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from advmoe_deploy.data import pixels
from advmoe_deploy.data.dataset import mixed
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError, UsageError
from tests.data.test_data import digit_png


def write_hub_file(
    path: Path, image: str, label: str, size: int, names: list[str], first: int = 0
) -> None:
    rows = [{"bytes": digit_png(row, size), "path": None} for row in range(first, first + 10)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {image: pa.array(rows, kind), label: pa.array(range(10), pa.int64())}
    features = {"info": {"features": {label: {"names": names}}}}
    metadata = {b"huggingface": json.dumps(features).encode()}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


@pytest.mark.parametrize(
    ("name", "image", "label", "test", "size", "classes"),
    [
        ("cifar100", "img", "fine_label", "test", 32, 100),
        ("tiny-imagenet", "image", "label", "valid", 64, 200),
    ],
)
def test_a_hub_set_names_its_classes(
    tmp_path: Path, name: str, image: str, label: str, test: str, size: int, classes: int
) -> None:
    names = [f"thing {index}" for index in range(classes)]
    for first, split in ((0, "train"), (10, test)):
        file = tmp_path / f"{split}-00000-of-00001.parquet"
        write_hub_file(file, image, label, size, names, first)
    data = load_dataset(f"{name}:{tmp_path}")
    assert data.class_names == tuple(names)
    assert data.image_shape == (3, size, size)
    assert (len(data.train), len(data.holdout), len(data.test)) == (8, 2, 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes: ten black and ten white images to train on, two of each to test on.

    No two are of the same grey: an image of one split may be in no other.
    """
    for split, first, count in (("train", 0, 10), ("val", 10, 2)):
        for label in ("black", "white"):
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(count):
                grey = first + index if label == "black" else 255 - first - index
                image = Image.new("L", (20 + index, 12), grey)
                image.save(tmp_path / split / label / f"{index}.png")
    return tmp_path


def shades(indices: Iterable[int]) -> set[tuple[int, int]]:
    """Return the greys that ``folder`` has at these indices, each with its label."""
    return {pair for index in indices for pair in ((index, 0), (255 - index, 1))}


def greys(images: Iterable[NDArray[np.uint8]], labels: Iterable[int]) -> set[tuple[int, int]]:
    """Return the grey of each image with its label."""
    return {(int(i.flat[0]), int(label)) for i, label in zip(images, labels, strict=True)}


def test_an_image_folder_is_scaled_and_split(folder: Path) -> None:
    data = load_dataset(f"folder:{folder}?size=8")
    assert data.class_names == ("black", "white")
    assert data.image_shape == (3, 8, 8)
    assert (len(data.train), len(data.holdout), len(data.test)) == (16, 4, 4)
    assert np.bincount(data.holdout.labels).tolist() == [2, 2]
    for split in (data.train, data.holdout, data.test):
        assert not np.ptp(split.images, axis=(1, 2, 3)).any()
    trained, tested = ([*data.train.images, *data.holdout.images], data.test.images)
    assert greys(trained, [*data.train.labels, *data.holdout.labels]) == shades(range(10))
    assert greys(tested, data.test.labels) == shades(range(10, 12))


def test_the_first_images_are_of_all_classes(folder: Path, tmp_path: Path) -> None:
    data = load_dataset(f"folder:{folder}?size=8")
    for split in (data.train, data.holdout, data.test):
        for count in range(2, len(split) + 1, 2):
            assert np.bincount(split.first(count).labels).tolist() == [count // 2] * 2
    assert np.array_equal(load_dataset(data.source).train.labels, data.train.labels)
    # What is mixed already keeps its order.
    labels, rows = np.array([1, 0, 1, 0]), np.array([0, 1, 3])
    assert mixed(labels, rows) is rows


def test_an_image_of_absurd_size_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DataError, match=r"\.png: Image size .* exceeds limit of 100"):
        load_dataset(f"folder:{folder}?size=8")


def test_too_few_images_to_hold_any_out_are_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in ("black", "white"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / split / label / "0.png")
    with pytest.raises(DataError, match="holds 2 images; give at least five"):
        load_dataset(f"folder:{tmp_path}?size=8")


def test_a_large_split_is_kept_in_a_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_dataset(f"folder:{folder}?size=8")
    monkeypatch.setenv("ADVMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pixels, "IN_MEMORY_BYTES", 0)
    for _ in range(2):
        data = load_dataset(f"folder:{folder}?size=8")
        assert isinstance(data.train.images, np.memmap)
        assert np.array_equal(data.train.images, expected.train.images)
    kept = sorted(file.suffix for file in (tmp_path / "cache").iterdir())
    # One file a split and one of its digests, nothing half-written.
    assert kept == [".npy"] * 3 + [".sha256"] * 3


def test_large_splits_of_one_name_and_shape_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADVMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pixels, "IN_MEMORY_BYTES", 0)
    found = []
    for first in (0, 10):
        root = tmp_path / str(first)
        root.mkdir()
        for own_first, split in ((first, "train"), (first + 20, "test")):
            file = root / f"{split}-00000-of-00001.parquet"
            write_hub_file(file, "img", "label", 32, [], own_first)
        found.append(load_dataset(f"cifar10:{root}").test.images)
    assert not np.array_equal(*found)


def test_imagenet_is_cut_from_the_middle(folder: Path) -> None:
    wide = np.zeros((300, 600, 3), np.uint8)
    wide[:, 200:400] = 255
    for name in ("0.png", "1.png"):
        Image.fromarray(wide).save(folder / "val" / "black" / name)
    split = load_dataset(f"imagenet:{folder}").test
    test = split.images[split.labels == 0][0]
    assert test.shape == (3, 224, 224)
    assert test[:, :, 112].min() == 255
    assert test[:, :, 0].max() == 0


def test_what_is_wrong_with_a_folder_is_one_line(folder: Path) -> None:
    with pytest.raises(UsageError, match="needs a folder"):
        load_dataset("imagenet")
    with pytest.raises(UsageError, match="write folder:PATH"):
        load_dataset(f"folder:{folder}")
    (folder / "val" / "black" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png: not a PNG"):
        load_dataset(f"folder:{folder}?size=8")
    (folder / "val" / "grey").mkdir()
    with pytest.raises(DataError, match="different classes"):
        load_dataset(f"folder:{folder}?size=8")


@pytest.mark.skipif(sys.platform != "linux", reason="room is taken in advance on Linux")
def test_a_large_split_has_its_room_on_the_disk_before_an_image_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADVMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(pixels, "IN_MEMORY_BYTES", 0)

    def read(row: int) -> np.ndarray:
        (file,) = tmp_path.iterdir()
        assert 512 * file.stat().st_blocks > images * 3 * 64 * 64  # else a full disk is a SIGBUS
        return np.full((3, 64, 64), row, np.uint8)

    images = 40
    found = pixels.stacked(read, range(images), Decoding.of(64), lambda: "key")
    assert found[:, 0, 0, 0].tolist() == [*range(images)]
    assert [file.suffix for file in tmp_path.iterdir()] == [".npy"]

"""Splits share no image, and data are known by content."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from advmoe_deploy.data import pixels as pixels_module
from advmoe_deploy.data.dataset import Dataset, Split, mixed
from advmoe_deploy.data.registry import absolute, load_dataset
from advmoe_deploy.errors import DataError
from tests.data.images import pixels, png, write_folders, write_png, write_table


def contents(split: Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


def assert_disjoint(data: Dataset) -> None:
    train, holdout, test = map(contents, (data.train, data.holdout, data.test))
    assert not train & holdout
    assert not (train | holdout) & test


@pytest.mark.parametrize("in_memory_bytes", [1 << 30, 0])
def test_copies_of_training_images_are_on_one_side(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    in_memory_bytes: int,
) -> None:
    monkeypatch.setenv("ADVMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pixels_module, "IN_MEMORY_BYTES", in_memory_bytes)
    root = write_folders(tmp_path / "set")
    clean = load_dataset(f"folder:{root}?size=32")
    for name in ("a", "b"):
        for index in range(10):
            image = root / "train" / name / f"{index}.png"
            shutil.copy(image, root / "train" / name / f"{index} (1).png")
    with caplog.at_level(logging.WARNING):
        data = load_dataset(f"folder:{root}?size=32")
    assert_disjoint(data)
    # All twenty images are still there, half of each class, and labelled as before.
    assert contents(data.train) | contents(data.holdout) == contents(clean.train) | contents(
        clean.holdout
    )
    assert len(data.holdout) == 8
    labels = {i.tobytes(): n for i, n in zip(clean.train.images, clean.train.labels, strict=True)}
    for image, label in zip(data.train.images, data.train.labels, strict=True):
        assert labels.get(image.tobytes(), label) == label
    assert "are there more than once, such as " in caplog.text
    again = load_dataset(f"folder:{root}?size=32")
    assert again.fingerprint == data.fingerprint
    assert np.array_equal(again.train.images, data.train.images)


def test_a_frequent_image_stays_in_training(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    for index in range(30):
        write_png(root / "train" / "a" / f"blank {index}.png", 7777)
    data = load_dataset(f"folder:{root}?size=32")
    assert_disjoint(data)
    counts = [(data.train.images == image).all(axis=(1, 2, 3)).sum() for image in data.train.images]
    assert max(counts) >= 20


def test_test_images_that_also_train_are_an_error_that_names_two_files(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "set")
    shutil.copy(root / "train" / "a" / "7.png", root / "val" / "a" / "leak.png")
    with pytest.raises(DataError) as caught:
        load_dataset(f"folder:{root}?size=32")
    message = str(caught.value)
    assert "1 of 7 test images" in message
    assert f"{root}/train/a/7.png and {root}/val/a/leak.png" in message
    write_table(tmp_path / "hub" / "train.parquet", range(20))
    write_table(tmp_path / "hub" / "test.parquet", range(10, 20))
    with pytest.raises(
        DataError, match=r"10 of 10 test .*train\.parquet, row .*test\.parquet, row"
    ):
        load_dataset(f"cifar10:{tmp_path / 'hub'}")


def test_a_test_image_in_two_hundred_may_train_and_is_then_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_table(tmp_path / "train.parquet", range(20))
    write_table(tmp_path / "test.parquet", [3, *range(100, 299)])
    data = load_dataset(f"cifar10:{tmp_path}")
    assert_disjoint(data)
    assert len(data.test) == 200
    assert len(data.train) + len(data.holdout) == 19
    assert "1 test images are training images too" in caplog.text


def test_a_holdout_of_test_images_only_is_refused(tmp_path: Path) -> None:
    for label, name in enumerate("ab"):
        for index in range(100):
            write_png(tmp_path / "val" / name / f"{index}.png", 200 * label + index)
    for index in range(3):
        write_png(tmp_path / "train" / "a" / f"{index}.png", 900 + index)
        write_png(tmp_path / "train" / "b" / f"{index}.png", 910 + index)
    source = f"folder:{tmp_path}?size=32"
    held = load_dataset(source).holdout.images[0].tobytes()
    (file,) = [
        file
        for index in (*range(900, 903), *range(910, 913))
        for file in [tmp_path / "train" / "ab"[index > 909] / f"{index % 10}.png"]
        if pixels(index).transpose(2, 0, 1).tobytes() == held
    ]
    write_png(file, 0)
    with pytest.raises(DataError, match="5 different images to train on that are no test images"):
        load_dataset(source)


def test_nothing_but_copies_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "train.parquet", [5] * 20)
    write_table(tmp_path / "test.parquet", range(100, 110))
    with pytest.raises(DataError, match="holds 1 different images to train on"):
        load_dataset(f"cifar10:{tmp_path}")


def test_the_fingerprint_tells_content_and_order(tmp_path: Path) -> None:
    def of(name: str, names: tuple[str, ...] = ("a", "b"), first: int = 0) -> tuple[str, str]:
        root = write_folders(tmp_path / name, names, first=first)
        found = load_dataset(f"folder:{root}?size=32").fingerprint
        assert found is not None
        return found.images, found.dealt

    first = of("here")
    assert of("there") == first
    assert of("words", ("one", "two")) == first
    swapped = of("swapped", ("b", "a"))
    assert swapped[0] == first[0]
    assert swapped[1] != first[1]
    other = of("other", first=1000)
    assert other[0] != first[0]
    assert other[1] != first[1]
    write_png(tmp_path / "there" / "val" / "a" / "new.png", 4321)
    assert of("there")[0] != first[0]


def test_a_source_means_the_same_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folders(tmp_path / "set [1]")
    monkeypatch.chdir(root.parent)
    source = load_dataset(f"folder:{root.name}?size=32").source
    assert source == f"folder:{root}?size=32"
    monkeypatch.chdir("/")
    assert load_dataset(source).source == source
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("cifar10:~/c") == f"cifar10:{tmp_path}/c"
    assert absolute("cifar10:~nobody-of-this-name/c") == "cifar10:/~nobody-of-this-name/c"
    assert absolute("digits") == "digits"
    assert absolute("cifar10") == "cifar10"


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    root = write_folders(tmp_path)
    (root / "train" / "a").chmod(0)
    with pytest.raises(DataError, match="may not read"):
        load_dataset(f"folder:{root}?size=32")


def test_images_are_told_by_pixels_not_by_files(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    # A comment after the image's end changes the file and none of its pixels.
    (root / "val" / "b" / "leak.png").write_bytes(png(101) + b"comment")
    with pytest.raises(DataError, match=r"train/b/1\.png and .*val/b/leak\.png"):
        load_dataset(f"folder:{root}?size=32")


@pytest.mark.parametrize(
    "labels",
    [
        np.repeat([0, 1, 2], 20),
        np.repeat([2, 0, 1], 20),  # classes that a table numbers otherwise
        np.tile(np.repeat([0, 1, 2], 10), 2),  # two files, each class by class
    ],
)
def test_what_comes_class_by_class_is_dealt(labels: np.ndarray) -> None:
    rows = mixed(labels, np.arange(60))
    assert sorted(rows) == [*range(60)]
    for first in range(0, 60, 12):
        assert np.bincount(labels[rows[first : first + 12]]).tolist() == [4, 4, 4]


@pytest.mark.parametrize("classes", [2, 10, 60])
def test_what_is_mixed_or_has_one_image_a_class_keeps_its_order(classes: int) -> None:
    for labels in (np.random.default_rng(classes).permutation(60) % classes, np.arange(60)):
        assert mixed(labels, np.arange(60)).tolist() == [*range(60)]

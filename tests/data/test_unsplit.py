"""Folders of photographs as people have them: classes, and no split for the test."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from advmoe_deploy.data.folder import survey
from advmoe_deploy.data.registry import absolute, folder_in, load_dataset, load_test_split
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import AdvMoEError, DataError, UsageError
from tests.data.images import write_folders, write_photos, write_png


def refused(source: str) -> str:
    with pytest.raises(AdvMoEError) as caught:
        load_dataset(source, Decoding.of(8))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_fifth_of_each_class_is_kept_for_the_test_always_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_photos(tmp_path / "photos", count=10)
    with caplog.at_level(logging.WARNING):
        data = load_dataset(str(root), Decoding.of(16))
    assert data.class_names == ("digit", "flower", "temple")
    assert data.source == f"folder:{root}?size=16"
    assert [len(split) for split in (data.train, data.holdout, data.test)] == [20, 4, 6]
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2]
    assert "a fifth of each class, 6 in all, is kept for the test" in caplog.text
    again = load_dataset(data.source)
    assert again.fingerprint == data.fingerprint
    assert np.array_equal(load_test_split(data.source).images, data.test.images)


def test_training_images_alone_are_split_as_well(tmp_path: Path) -> None:
    write_photos(tmp_path / "a" / "train", count=10)
    write_photos(tmp_path / "b", count=10)
    alone, plain = (load_dataset(str(tmp_path / name), Decoding.of(16)) for name in "ab")
    assert alone.fingerprint == plain.fingerprint


def test_a_class_may_be_called_train_where_it_is_no_split(tmp_path: Path) -> None:
    numbers = iter(range(1000))
    for root, names in (
        ("vehicles", ("car", "plane", "train")),
        ("flat", ("test", "train")),
        ("unlabelled", ("car", "plane", "test")),
    ):
        for name in names:
            for index in range(5):
                write_png(tmp_path / root / name / f"{index}.png", next(numbers))
    data = load_dataset(str(tmp_path / "vehicles"), Decoding.of(8))
    assert data.class_names == ("car", "plane", "train")
    assert np.bincount(data.test.labels).tolist() == [1, 1, 1]
    refused(str(tmp_path / "flat"))
    told = refused(str(tmp_path / "unlabelled"))
    assert "the classes car, plane and a folder test with images in it" in told
    assert "rename it if it is one, else sort its images into test/CLASS/" in told


def test_a_test_sorted_by_class_beside_the_classes_is_the_test(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = iter(range(1000))
    for folder, count in (("cat", 10), ("dog", 10), ("test/cat", 3), ("test/dog", 2)):
        for index in range(count):
            write_png(tmp_path / folder / f"{index}.png", next(numbers))
    with caplog.at_level(logging.WARNING):
        data = load_dataset(str(tmp_path), Decoding.of(8))
    assert data.class_names == ("cat", "dog")
    assert np.bincount(data.test.labels).tolist() == [3, 2]
    assert len(data.train) + len(data.holdout) == 20
    assert not caplog.text
    alone = load_test_split(str(tmp_path), Decoding.of(8))
    assert np.array_equal(alone.images, data.test.images)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    told = refused(str(tmp_path))
    assert "holds the classes cat, dog, and test beside them holds cat, wolf; name them" in told


@pytest.mark.parametrize(
    ("test", "other"),
    [("Test", "train"), ("test", "val/{}"), ("testing", "Val/{}"), ("val", "test")],
)
def test_a_split_beside_the_test_is_said_to_be_unread(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, test: str, other: str
) -> None:
    numbers = iter(range(1000))
    for name in ("cat", "dog"):
        for folder, count in ((name, 10), (f"{test}/{name}", 3), (other.format(name), 2)):
            for _ in range(count):
                number = next(numbers)
                write_png(tmp_path / folder / f"{number}.png", number)
    with caplog.at_level(logging.WARNING):
        data = load_dataset(str(tmp_path), Decoding.of(8))
    assert (len(data.train) + len(data.holdout), len(data.test)) == (20, 6)
    assert f"{test} is the test, and {other[:5].partition('/')[0]} beside it is not" in caplog.text


def test_images_beside_class_folders_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_folders(tmp_path / "photos")
    for index in range(2):
        write_png(root / "train" / f"loose-{index}.png", 900 + index)
    with caplog.at_level(logging.WARNING):
        data = load_dataset(str(root), Decoding.of(8))
    assert len(data.train) + len(data.holdout) == 20
    assert caplog.text.count("no class folder") == 1
    said = "2 images below train lie in no class folder and are not read, such as train/loose-0.png"
    assert said in caplog.text


def test_a_copy_of_a_test_image_is_not_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_photos(tmp_path / "photos", count=10)
    for index in range(10):
        copied = next((root / "digit").glob(f"{index:03}.*"))
        shutil.copy(copied, copied.with_stem(f"copy of {index}"))
    with caplog.at_level(logging.WARNING):
        data = load_dataset(str(root), Decoding.of(16))
    held = {image.tobytes() for split in (data.train, data.holdout) for image in split.images}
    assert not held & {image.tobytes() for image in data.test.images}
    assert "they are not trained on" in caplog.text


def test_what_photographs_are_like(tmp_path: Path) -> None:
    seen = survey(write_photos(tmp_path / "photos", count=5))
    assert seen.class_names == ("digit", "flower", "temple")
    assert 90 <= seen.side < 200
    assert not seen.is_grey


def test_what_is_no_folder_of_classes_is_one_line(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        for index in range(5):
            write_png(tmp_path / "deep" / "in" / name / f"{index}.png", index)
            write_png(tmp_path / "empty" / name / f"{index}.png", index)
            write_png(tmp_path / "loose" / f"{name}-{index}.png", index)
    write_png(tmp_path / "few" / "cats" / "0.png", 0)
    shutil.copytree(tmp_path / "empty" / "dogs", tmp_path / "few" / "dogs")
    shutil.copytree(tmp_path / "empty" / "dogs", tmp_path / "one" / "dogs")
    (tmp_path / "empty" / "birds").mkdir()
    assert f"name {tmp_path}/deep/in, which holds cats, dogs" in refused(f"{tmp_path}/deep")
    assert "1 class folder, dogs; give at least two" in refused(f"{tmp_path}/one")
    assert "birds holds no image" in refused(f"{tmp_path}/empty")
    assert "or remove the folder" in refused(f"{tmp_path}/empty")
    assert "cats holds 1 image; give each class at least 5" in refused(f"{tmp_path}/few")
    assert "holds 10 images and no class folders" in refused(f"{tmp_path}/loose")
    assert "there is no folder" in refused(f"{tmp_path}/missing")
    assert "And no folder is called 'fotos'" in refused("fotos")


def test_a_path_alone_is_a_folder_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "digits").mkdir()
    assert (
        absolute("photos", 64) == absolute("./photos/", 64) == f"folder:{tmp_path}/photos?size=64"
    )
    assert absolute("photos?size=32", 64) == f"folder:{tmp_path}/photos?size=32"
    assert absolute("digits", 64) == "digits"
    assert folder_in("photos") == (Path("photos"), None)
    assert folder_in("folder:photos?size=32") == (Path("photos"), 32)
    assert folder_in("cifar10:photos") is None
    for size in ("abc", "", "-8", "4"):
        with pytest.raises(UsageError, match="names no size in"):
            folder_in(f"photos?size={size}")
    with pytest.raises(UsageError, match="names no size"):
        absolute("photos")


def test_a_damaged_head_is_one_line(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", count=5)
    (root / "digit" / "000.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"000\.jpg: not a PNG"):
        survey(root)


def test_a_class_or_a_folder_whose_name_is_no_text_is_one_line(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", count=5)
    latin = os.fsdecode(b"caf\xe9")
    try:
        (root / "flower").rename(root / latin)
    except OSError:
        pytest.skip("this file system takes no such name")
    assert f"the name of b'{root}/caf\\xe9' is no UTF-8; rename it" in refused(str(root))
    (root / latin).rename(root / "flower")
    root = root.rename(tmp_path / latin)
    assert f"the name of b'{tmp_path}/caf\\xe9' is no UTF-8; rename it" in refused(str(root))

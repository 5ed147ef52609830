"""Which files below a folder are data: hidden ones are not, links are followed once."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from advmoe_deploy.data.layouts.tree import Tree, tree_of
from advmoe_deploy.data.registry import load_dataset
from tests.data.images import write_folders, write_png


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


def test_folders_that_are_links_are_followed_once(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "set")
    (root / "train" / "b").rename(tmp_path / "elsewhere")
    (root / "train" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(root / "train" / "b")
    data = load_dataset(f"folder:{root}?size=32")
    assert len(data.train) + len(data.holdout) == 20


@pytest.mark.skipif(os.name == "nt", reason="needs mkfifo")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    write_png(tmp_path / "a" / "0.png", 0)
    os.mkfifo(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").symlink_to("0.png")
    (tmp_path / "a" / "3.png").symlink_to("1.png")
    (tmp_path / "a" / "4.png").symlink_to("nowhere.png")
    (tmp_path / "a" / "5.png").symlink_to("5.png")
    assert tree_of(tmp_path).files == ("a/0.png", "a/2.png", "a/4.png", "a/5.png")


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


class Seldom(tuple[str, ...]):
    """Files that must not be gone through one by one."""

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("every file was looked at")


def test_what_is_below_one_of_thousands_of_folders_is_found_without_a_look_at_each_file(
    tmp_path: Path,
) -> None:
    names = ("a", "a b", "a-b", "a.b", "ab", "b")
    for name in names:
        write_png(tmp_path / name / "deep" / "0.png", 0)
        write_png(tmp_path / name / "1.png", 0)
    tree = tree_of(tmp_path)
    tree = Tree(tree.root, Seldom(tree.files), tree.folders)
    for name in names:
        assert tree.below(name) == (f"{name}/1.png", f"{name}/deep/0.png")
    assert tree.below("a/deep") == ("a/deep/0.png",)
    assert not tree.below("0")
    assert not tree.below("c")

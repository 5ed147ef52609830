"""What a batch job reads: one row, or one error, or one word about it, for everything there is."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from advmoe_deploy.decoding import IMAGE_SUFFIXES
from advmoe_deploy.errors import DataError
from advmoe_deploy.serving.inputs import list_inputs


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(root: Path, source: Path | str) -> list[str]:
    return [str(Path(path).relative_to(root)) for path in list_inputs(str(source))]


def skipped(source: Path | str) -> dict[str, int]:
    return {one.reason: one.count for one in list_inputs(str(source)).skipped}


def test_a_folder_gives_its_images_sorted(tmp_path: Path) -> None:
    touch(*(tmp_path / n for n in ("b.PNG", "a.jpg", "c/a.webp", "notes.txt", ".hidden.png")))
    names = [str(Path(p).relative_to(tmp_path)) for p in list_inputs(str(tmp_path))]
    assert names == ["a.jpg", "b.PNG", "c/a.webp"]


def test_patterns_lists_and_files(tmp_path: Path) -> None:
    touch(*(tmp_path / n for n in ("1.png", "2.png", "deep/3.png")))
    assert len(list_inputs(str(tmp_path / "*.png"))) == 2
    assert len(list_inputs(str(tmp_path / "**" / "*.png"))) == 3
    assert tuple(list_inputs(str(tmp_path / "1.png"))) == (str(tmp_path / "1.png"),)
    (tmp_path / "list.txt").write_text("deep/3.png\n\n1.png\nmissing.png\n")
    expected = tuple(str(tmp_path / n) for n in ("1.png", "deep/3.png", "missing.png"))
    assert tuple(list_inputs(str(tmp_path / "list.txt"))) == expected


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder").mkdir()
    for source in ("folder", "empty.txt", "binary.txt", "*.png", "missing"):
        with pytest.raises(DataError):
            list_inputs(str(tmp_path / source))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder ``in`` with real/a.png, a linked folder, a link to nothing and one to itself."""
    touch(tmp_path / "in" / "real" / "a.png", tmp_path / "elsewhere" / "b.png")
    (tmp_path / "in" / "album").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "gone.png").symlink_to("/nonexistent")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    return tmp_path / "in"


def test_links_are_followed_and_those_to_nothing_are_errors(root: Path) -> None:
    listing = list_inputs(str(root))
    assert names(root, root) == ["album/b.png", "gone.png", "real/a.png"]
    gone = str(root / "gone.png")
    assert listing.errors == {gone: "a link to '/nonexistent', where nothing is"}
    assert skipped(root) == {"a link to a folder that is read already": 1}


def test_a_pattern_gives_a_file_behind_a_loop_once(root: Path) -> None:
    assert names(root, root / "**" / "*.png") == ["album/b.png", "gone.png", "real/a.png"]
    (root / "again").symlink_to(".")
    (root / "real" / "up").symlink_to("..")
    assert names(root, root / "**" / "a.png") == ["real/a.png"]
    assert names(root, root / "**" / "**" / "a.p*") == ["real/a.png"]


def test_a_pattern_looks_into_each_folder_once(tmp_path: Path) -> None:
    touch(tmp_path / "real" / "a.png", tmp_path / "b.png")
    for link in ("again", "once-more"):
        (tmp_path / link).symlink_to(".")
        (tmp_path / "real" / link).symlink_to("..")
    (found,) = names(tmp_path, "/".join([str(tmp_path), *["*"] * 30, "a.png"]))
    assert found.endswith("/real/a.png")
    assert found.count("/") == 30
    assert names(tmp_path, tmp_path / "*" / "*.png") == ["again/b.png", "real/a.png"]
    found = names(tmp_path, "/".join([str(tmp_path), *["**/*"] * 30, "*.png"]))
    assert [Path(path).name for path in found] == ["b.png", "a.png"]


def test_a_file_is_read_once_and_by_its_own_name(root: Path) -> None:
    (root / "A.png").symlink_to("real/a.png")
    (root / "C.png").symlink_to(root.parent / "elsewhere" / "b.png")
    (root / "Album").symlink_to(root.parent / "elsewhere")
    for source in (root, root / "**" / "*.png"):
        assert names(root, source) == ["Album/b.png", "gone.png", "real/a.png"]


def test_a_hard_link_is_a_file_of_its_own(tmp_path: Path) -> None:
    touch(tmp_path / "a.png")
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    assert names(tmp_path, tmp_path) == ["a.png", "b.png"]


def test_links_in_a_circle_are_errors(tmp_path: Path) -> None:
    (tmp_path / "x.png").symlink_to("y.png")
    (tmp_path / "y.png").symlink_to("x.png")
    (tmp_path / "album").symlink_to("album")
    for source in (tmp_path, tmp_path / "*"):
        assert set(list_inputs(str(source)).errors.values()) == {
            "its links lead in a circle; name a file that is there"
        }
        assert names(tmp_path, source) == ["album", "x.png", "y.png"]


def test_what_is_no_image_is_counted_and_named(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.png", "Thumbs.db", "notes.txt", "._a.png")))
    touch(tmp_path / ".cache" / "b.png", *(tmp_path / f"{i}.csv" for i in range(7)))
    hidden, other = list_inputs(str(tmp_path)).skipped
    assert (hidden.reason, hidden.count) == ("hidden", 2)
    assert hidden.examples == (str(tmp_path / "._a.png"), str(tmp_path / ".cache"))
    assert other.count == len(other.examples) == 9  # all by name; few of them in the summary
    assert str(other).endswith(f"{other.examples[4]!r}, ...")
    assert str(other).startswith("9 skipped, not an image by its suffix: '")
    assert str(other).endswith(", ...")


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_suffix_of_an_image_is_read(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path / f"a{suffix}", tmp_path / f"b{suffix.upper()}")
    assert len(list_inputs(str(tmp_path))) == 2


def test_hidden_inputs_that_are_named_are_read(tmp_path: Path) -> None:
    touch(tmp_path / ".cache" / "a.png", tmp_path / ".b.png")
    for source in (".cache", ".cache/*.png", ".c*/*.png", ".b.png", ".*.png"):
        assert len(list_inputs(str(tmp_path / source))) == 1
    (tmp_path / "list.txt").write_text(".b.png\n.cache/a.png\n")
    assert names(tmp_path, tmp_path / "list.txt") == [".b.png", ".cache/a.png"]


def test_patterns_pass_over_hidden_names_and_folders_but_say_so(tmp_path: Path) -> None:
    touch(tmp_path / "a.png", tmp_path / ".b.png", tmp_path / ".cache" / "c.png")
    touch(tmp_path / "folder.png" / "d.png")
    assert names(tmp_path, tmp_path / "*.png") == ["a.png"]
    assert skipped(tmp_path / "*.png") == {"hidden": 1, "a folder that the pattern matches": 1}
    assert names(tmp_path, tmp_path / "**") == ["a.png", "folder.png/d.png"]
    assert skipped(tmp_path / "**")["hidden"] == 2


def test_what_exists_is_a_path_whatever_its_characters(tmp_path: Path) -> None:
    touch(tmp_path / "photos [1]" / "a.png", tmp_path / "photos 1" / "b.png")
    touch(tmp_path / "what?*" / "[x].png", tmp_path / "what?*" / "x.png")
    assert names(tmp_path, tmp_path / "photos [1]") == ["photos [1]/a.png"]
    assert names(tmp_path, tmp_path / "photos [1]" / "*.png") == ["photos [1]/a.png"]
    assert names(tmp_path, tmp_path / "photos [1]" / "**" / "*.png") == ["photos [1]/a.png"]
    assert names(tmp_path, tmp_path / "what?*" / "[x].png") == ["what?*/[x].png"]
    assert names(tmp_path, tmp_path / "what?*" / "[xy].png") == ["what?*/x.png"]
    assert names(tmp_path, tmp_path / "photos [0-9]" / "*.png") == ["photos 1/b.png"]


def test_relative_sources_give_relative_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "a" / "b.png")
    monkeypatch.chdir(tmp_path)
    for source in ("a", "a/*.png", "**/*.png", "*/b.png", "./*/b.png", "."):
        assert tuple(list_inputs(source)) == ("a/b.png",)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_lists_of_any_editor_are_read(tmp_path: Path, newline: str, encoding: str) -> None:
    touch(tmp_path / "ж.png", tmp_path / " b c.png", tmp_path / "line\u2028.png")
    text = newline.join(["ж.png", "", " b c.png", "line\u2028.png", "  gone.png ", ""])
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    (tmp_path / "list.txt").write_bytes((mark + text).encode(encoding))
    listing = list_inputs(str(tmp_path / "list.txt"))
    expected = sorted(["ж.png", " b c.png", "line\u2028.png", "gone.png"])
    assert [Path(path).name for path in listing] == expected
    assert listing.errors == {str(tmp_path / "gone.png"): "no such file or folder; check the path"}


def test_lists_that_are_no_text_are_refused(tmp_path: Path) -> None:
    for content in (b"a.png\0b.png\0", "a.png".encode("utf-16-le"), b"\xff\xfe\0\0a\0\0\0"):
        (tmp_path / "list.txt").write_bytes(content)
        with pytest.raises(DataError, match="one image path per line"):
            list_inputs(str(tmp_path / "list.txt"))


def test_a_list_may_name_what_is_no_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    touch(tmp_path / name)
    (tmp_path / "list.txt").write_bytes(b"\xff.png\n")
    listing = list_inputs(str(tmp_path / "list.txt"))
    assert tuple(listing) == (str(tmp_path / name),)
    assert not listing.errors


def test_a_line_that_is_no_file_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    touch(tmp_path / "folder" / "a.png")
    (tmp_path / "list.txt").write_text("pipe.png\nfolder\nfolder/a.png/b.png\n")
    listing = list_inputs(str(tmp_path / "list.txt"))
    assert [listing.errors[path] for path in listing] == [
        "a folder, not an image",
        "not a directory: a file stands where the path has a folder; check the path",
        "not a regular file",
    ]
    assert list_inputs(str(tmp_path)).errors == {str(tmp_path / "pipe.png"): "not a regular file"}


def test_nothing_found_says_what_was_passed_over(tmp_path: Path) -> None:
    touch(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"1 skipped, not an image by its suffix: '.*a\.csv'"):
        list_inputs(str(tmp_path))
    with pytest.raises(DataError, match="empty"):
        list_inputs("")


@pytest.fixture
def private_folder() -> Iterator[Path]:
    """A folder that holds another, which nobody may read; for root too, who gives up being root."""
    root = Path(tempfile.mkdtemp())
    touch(root / "open.png", root / "closed" / "a.png")
    (root / "closed").chmod(0)
    root.chmod(0o755)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield root
    finally:
        if is_root:
            os.seteuid(0)
        (root / "closed").chmod(0o755)
        shutil.rmtree(root)


def test_a_folder_that_may_not_be_read_is_an_error(private_folder: Path) -> None:
    closed = private_folder / "closed"
    error = "the folder cannot be read: permission denied: you may not read it; change its "
    error += "permissions, or name a copy"
    for source in (private_folder, private_folder / "**" / "*.png", private_folder / "*" / "*.png"):
        assert list_inputs(str(source)).errors[str(closed)] == error
    assert names(private_folder, private_folder) == ["closed", "open.png"]
    assert list_inputs(str(closed / "a.png")).errors == {str(closed): error}


def test_order_does_not_depend_on_how_files_came(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(50)
    for folder, numbers in (("x", order), ("y", order[::-1])):
        touch(*(tmp_path / folder / f"{i % 3}" / f"{i}.png" for i in numbers))
    x, y = (names(tmp_path / folder, tmp_path / folder) for folder in "xy")
    assert x == y == sorted(x)
    assert len(x) == 50

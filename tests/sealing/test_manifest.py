"""Bundles whose hashes fit and whose content is hostile end in one line."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from advmoe_deploy.bundle import GOLDEN, MANIFEST, MANIFEST_HASH, open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import BundleError
from advmoe_deploy.sealing.golden import golden_arrays
from tests.sealing.bundles import put, put_manifest


def refused(copied: Path, text: str) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(copied)
    assert text in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "segments/extra.onnx", "model.onnx.data"])
def test_a_file_that_is_not_listed_is_refused(copied: Path, name: str) -> None:
    (copied / name).write_bytes(b"x")
    refused(copied, f"'{name}' is not listed")


def test_a_name_cannot_write_to_the_terminal(copied: Path) -> None:
    (copied / "a\x1b[2J\nb").write_bytes(b"x")
    refused(copied, r"\x1b[2J\n")


@pytest.mark.parametrize("target", ["model.onnx", "segments", "nowhere"])
def test_a_link_is_refused(copied: Path, target: str) -> None:
    (copied / "link").symlink_to(target)
    refused(copied, "'link' is a link")


def test_a_pipe_is_refused(copied: Path) -> None:
    os.mkfifo(copied / "pipe")
    refused(copied, "'pipe' is not listed")


def test_folders_of_nothing_are_refused_however_deep(copied: Path) -> None:
    here = copied
    for _ in range(200):
        here = here / "a"
        here.mkdir()
    refused(copied, "'a' is not listed")


@pytest.mark.parametrize("name", [MANIFEST, MANIFEST_HASH])
def test_a_manifest_that_is_too_large_or_no_file_is_not_read(copied: Path, name: str) -> None:
    with (copied / name).open("ab") as file:
        file.truncate(1 << 30)  # of which the disk holds nothing
    refused(copied, "has no manifest.json with its manifest.sha256")
    (copied / name).unlink()
    os.mkfifo(copied / name)
    refused(copied, "has no manifest.json with its manifest.sha256")


def test_what_a_killed_change_of_the_card_leaves_is_no_harm(copied: Path) -> None:
    (copied / ".MODEL_CARD.md.partial-host-123-0123abcd").write_bytes(b"# half")
    open_bundle(copied)


@pytest.mark.parametrize(
    "name",
    [
        "a\0b",
        "../a",
        "/a",
        "a/../b",
        "./a",
        "a//b",
        "a\\b",
        "",
        "a\n",
        "\ud800",
        "a" * 5000,
        "é" * 150,
    ],
)
def test_a_name_that_is_no_plain_name_is_refused(copied: Path, name: str) -> None:
    fields = json.loads((copied / MANIFEST).read_bytes())
    fields["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    put_manifest(copied, fields)
    with pytest.raises(BundleError) as caught:
        open_bundle(copied)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[]",
        b"null",
        b"\xff",
        b'{"schema_version": ' + b"9" * 5000 + b"}",
        b'{"schema_version": NaN}',
        b"",
    ],
    ids=["brackets", "braces", "list", "null", "bytes", "digits", "nan", "empty"],
)
def test_a_manifest_of_another_form_is_refused(copied: Path, text: bytes) -> None:
    put_manifest(copied, text)
    with pytest.raises(BundleError) as caught:
        open_bundle(copied)
    assert str(caught.value).isprintable()


def test_a_manifest_with_many_faults_is_refused_in_a_short_line(copied: Path) -> None:
    fields = json.loads((copied / MANIFEST).read_bytes())
    put_manifest(copied, fields | {f"surprise{n}\x1b[2J": n for n in range(10_000)})
    with pytest.raises(BundleError, match=r"and 9,\d+ more") as caught:
        open_bundle(copied)
    assert len(str(caught.value)) < 1000


def _objects() -> bytes:
    file = io.BytesIO()
    np.savez(file, images=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


def _compressed() -> bytes:
    """Return a bomb: 64 MiB of zeros in 64 KiB."""
    content, file = io.BytesIO(), io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 18, 1, 8, 8)}
    np.lib.format.write_array_header_1_0(content, header)  # type: ignore[arg-type]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", content.getvalue() + bytes(1 << 26))
    return file.getvalue()


def _claims(shape: tuple[int, ...]) -> bytes:
    """Return a file whose one array claims a shape and has four bytes."""
    content = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, header)  # type: ignore[arg-type]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", content.getvalue() + bytes(4))
    return file.getvalue()


def _of(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _golden(**arrays: np.ndarray | np.float32) -> bytes:
    """Return what a bundle has, two images of it, but for ``arrays``."""
    ids = np.zeros((2, 1), np.int64)
    routes = {
        "scores": np.zeros((2, 2), np.float32),
        "expert_ids": ids,
        "weights": np.ones((2, 1), np.float32),
    }
    own = {"images": np.zeros((2, 1, 8, 8), np.float32), "logits": np.zeros((2, 10), np.float32)}
    return _of(**{**own, **{f"router.{n}": each for n, each in routes.items()}, **arrays})


def _header(text: bytes) -> bytes:
    """Return a file whose one array has ``text`` for a header."""
    content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", content)
    return file.getvalue()


def _encrypted() -> bytes:
    """Return a file that says of itself that a password is needed."""
    content = bytearray(_golden())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(mark)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(mark, at + 1)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_objects, "where numbers are expected"),
        (_compressed, "it is compressed"),
        (lambda: _claims((3 << 28, 1)), "has 4 bytes"),
        (lambda: _claims((-1, -1)), "has 4 bytes"),
        (lambda: _golden(images=np.zeros((2, 3, 9, 9), np.float32)), "and the model takes"),
        (lambda: _golden(images=np.zeros((0, 1, 8, 8), np.float32)), "cannot be read"),
        (lambda: _of(logits=np.zeros(3)), "it has no 'images'"),
        (lambda: _of(images=np.zeros((2, 1, 8, 8), np.float32)), "it has no 'logits'"),
        (lambda: _golden(logits=np.zeros((3, 10), np.float32)), r"'logits' is .*\[3, 10\]"),
        (lambda: _golden(logits=np.zeros(2, np.float32)), r"'logits' is .*\[2\]"),
        (lambda: _golden(images=np.zeros((2, 1, 8, 8))), "'images' is float64"),
        (lambda: _golden(**{"router.scores": np.float32(1)}), r"'router.scores' is .*\[\]"),
        (
            lambda: _golden(**{"router.expert_ids": np.zeros((2, 1))}),
            "'router.expert_ids' is float",
        ),
        (lambda: _header(b"(" * 60), "cannot be read"),
        (lambda: _header(b"-" * 60 + b"1"), "cannot be read"),
        (_encrypted, "it is encrypted"),
        (lambda: b"PK\x03\x04 nothing", "not a zip file"),
    ],
)
def test_golden_images_of_another_form_are_refused(
    copied: Path, content: Callable[[], bytes], reason: str
) -> None:
    put(copied, GOLDEN, content())
    with pytest.raises(BundleError, match=reason) as caught:
        golden_arrays(open_bundle(copied))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("command", ["serve", "predict"])
@pytest.mark.parametrize("how", ["brackets", "unlisted", "byte", "name"])
def test_the_command_line_says_one_line_and_exits_with_3(
    copied: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    how: str,
) -> None:
    fields = json.loads((copied / MANIFEST).read_bytes())
    if how == "brackets":
        put_manifest(copied, b"[" * 100_000)
    elif how == "name":
        put_manifest(copied, fields | {"files": {"a\0b": {"sha256": "", "bytes": 0}}})
    elif how == "unlisted":
        (copied / "x").touch()
    else:
        (copied / "reference.safetensors").write_bytes(b"x")
    out = tmp_path / "out.jsonl"
    options = ["--input", str(tmp_path), "--output", str(out)] if command == "predict" else []
    assert run([command, str(copied), *options]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("advmoe: error: ")
    assert not out.exists()


def test_no_flipped_byte_is_served(copied: Path) -> None:
    files = sorted(f for f in copied.rglob("*") if f.is_file())
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        for place in {0, len(content) // 3, len(content) - 1}:
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            with pytest.raises(BundleError) as caught:
                open_bundle(copied)
            assert "\n" not in str(caught.value)
        file.write_bytes(content)
    open_bundle(copied)

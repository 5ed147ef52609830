"""A bundle is whole or it is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest

from advmoe_deploy.bundle import MANIFEST, MANIFEST_HASH, SCHEMA_VERSION, Bundle, open_bundle
from advmoe_deploy.errors import BundleError
from advmoe_deploy.files import sha256_of

FILES = (
    "MODEL_CARD.md",
    "baselines/dense.onnx",
    "baselines/s-dense.onnx",
    "baselines/unfused.onnx",
    "engines/openvino-fp32/model.onnx",
    "golden.npz",
    "model.onnx",
    "reference.safetensors",
    "segments/router.expert-0.onnx",
    "segments/router.expert-1.onnx",
    "segments/router.onnx",
)


def edit_manifest(bundle: Path, **changes: object) -> None:
    """Change the manifest and make its hash fit again, as someone who means it would."""
    fields = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(fields | changes))
    digest = sha256_of(bundle / MANIFEST)
    (bundle / MANIFEST_HASH).write_text(f"{digest}  {MANIFEST}\n")


def test_the_list_of_files_is_complete(tiny_bundle: Bundle) -> None:
    assert tuple(sorted(tiny_bundle.manifest.files)) == FILES


@pytest.mark.parametrize("name", [*FILES, MANIFEST, MANIFEST_HASH])
@pytest.mark.parametrize("position", [0, -1])
def test_one_changed_byte_is_noticed(copied: Path, name: str, position: int) -> None:
    content = bytearray((copied / name).read_bytes())
    content[position] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(BundleError, match=r"SHA-256 differs") as caught:
        open_bundle(copied)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*FILES, MANIFEST, MANIFEST_HASH])
def test_a_missing_file_is_noticed(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(BundleError, match=r"missing|has no"):
        open_bundle(copied)


def test_a_truncated_file_is_noticed(copied: Path) -> None:
    content = (copied / "model.onnx").read_bytes()
    (copied / "model.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match=r"model\.onnx"):
        open_bundle(copied)


def test_another_schema_version_is_refused(copied: Path) -> None:
    edit_manifest(copied, schema_version=99)
    with pytest.raises(
        BundleError, match=f"schema version 99, this release reads {SCHEMA_VERSION}"
    ):
        open_bundle(copied)


def test_an_unknown_field_is_refused(copied: Path) -> None:
    edit_manifest(copied, surprise=1)
    with pytest.raises(BundleError, match="surprise"):
        open_bundle(copied)


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/hostname"])
def test_a_path_may_not_leave_the_bundle(copied: Path, name: str) -> None:
    (copied.parent / "outside.onnx").write_bytes(b"x")
    edit_manifest(copied, files={name: {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(BundleError, match="outside the bundle"):
        open_bundle(copied)


def test_a_link_out_of_the_bundle_is_refused(copied: Path, tiny_bundle: Bundle) -> None:
    (copied / "model.onnx").unlink()
    (copied / "model.onnx").symlink_to(tiny_bundle.path / "model.onnx")
    with pytest.raises(BundleError, match="outside the bundle"):
        open_bundle(copied)


def test_a_linked_directory_is_refused(copied: Path, tiny_bundle: Bundle) -> None:
    shutil.rmtree(copied / "segments")
    (copied / "segments").symlink_to(tiny_bundle.path / "segments")
    with pytest.raises(BundleError, match="outside the bundle"):
        open_bundle(copied)


def test_a_link_to_the_bundle_itself_is_fine(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_bundle.path)
    assert open_bundle(tmp_path / "link").manifest == tiny_bundle.manifest


def test_the_manifest_that_is_hashed_is_the_one_that_is_read(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open
    (copied / "another").write_bytes(b"{}")

    def swapping(path: Path, flags: int) -> int:
        opened = real(path, flags)
        if Path(path).name == MANIFEST:
            (copied / "another").replace(path)
        return opened

    monkeypatch.setattr(os, "open", swapping)
    assert open_bundle(copied).manifest.schema_version == SCHEMA_VERSION


def test_there_is_one_name_per_class(copied: Path) -> None:
    edit_manifest(copied, class_names=["a", "b"])
    with pytest.raises(BundleError, match="2 names for num_classes=10") as caught:
        open_bundle(copied)
    assert "\n" not in str(caught.value)


def test_half_a_character_is_no_name(copied: Path) -> None:
    edit_manifest(copied, class_names=[*"abcdefghi", "\ud800"])
    with pytest.raises(BundleError, match="surrogates not allowed"):
        open_bundle(copied)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no bundle"):
        open_bundle(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        open_bundle(tmp_path)


def test_a_file_that_is_not_listed_is_not_handed_out(tiny_bundle: Bundle) -> None:
    assert not tiny_bundle.has("engines/none")
    with pytest.raises(BundleError, match="engines/none"):
        tiny_bundle.file("engines/none")

"""ONNX Runtime Web out of npm's package: to the byte, or not at all."""

import base64
import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from advmoe_deploy.errors import BackendUnavailableError, InputError, MachineError
from advmoe_deploy.export.web.runtime import RELEASE, Member, Release, runtime_files

CONTENT = {"package/dist/a.mjs": b"export {};", "package/dist/a.wasm": b"\0asm"}
OTHERS = {"package/postinstall.js": b"harm", "../outside": b"harm"}


def tarball(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


PACKED = tarball(OTHERS | CONTENT)
SMALL = Release(
    package="small",
    version="1.0.0",
    integrity="sha512-" + base64.b64encode(hashlib.sha512(PACKED).digest()).decode(),
    members=tuple(
        Member(f"dist/{name[13:]}", name[13:], hashlib.sha256(content).hexdigest())
        for name, content in CONTENT.items()
    ),
)


def test_only_the_named_files_are_taken(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "small.tgz").write_bytes(PACKED)
    files = runtime_files(tmp_path / "in" / "small.tgz", SMALL)
    assert files == {"a.mjs": b"export {};", "a.wasm": b"\0asm"}
    assert [f.name for f in tmp_path.rglob("*")] == ["in", "small.tgz"]


def test_an_installed_package_will_do(tmp_path: Path) -> None:
    for name, content in CONTENT.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    assert runtime_files(tmp_path / "package", SMALL)["a.wasm"] == b"\0asm"
    (tmp_path / "package/dist/a.wasm").write_bytes(b"\0asn")
    with pytest.raises(InputError, match=r"a\.wasm is not small 1\.0\.0 \(its SHA-256 differs"):
        runtime_files(tmp_path / "package", SMALL)


@pytest.mark.parametrize("content", [b"", PACKED[:-1], tarball(CONTENT)])
def test_another_tarball_is_not_unpacked(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "small.tgz").write_bytes(content)
    with pytest.raises(InputError, match=r"its SHA-512 differs\); pass as --runtime"):
        runtime_files(tmp_path / "small.tgz", SMALL)


def test_without_npm_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendUnavailableError, match="npm is not installed") as caught:
        runtime_files()
    assert f"'npm pack {RELEASE.spec}'" in str(caught.value)


@pytest.mark.parametrize(
    "said", ["npm error code E404", "npm ERR! code E404", "env: 'node': No such file or directory"]
)
def test_what_npm_says_is_quoted(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "npm"
    program.write_text(f'#!/bin/sh\necho "{said}" >&2; echo "    at Object.f" >&2; exit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    reason = said.removeprefix("npm error ").removeprefix("npm ERR! ")
    with pytest.raises(MachineError) as caught:
        runtime_files(None, SMALL)
    assert f"npm cannot fetch small@1.0.0: {reason}; try again" in str(caught.value)


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_without_a_network_npm_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")  # where nobody listens
    monkeypatch.setenv("npm_config_cache", str(tmp_path))
    with pytest.raises(MachineError, match=r"npm cannot fetch small@1\.0\.0: .*ECONNREFUSED"):
        runtime_files(None, SMALL)

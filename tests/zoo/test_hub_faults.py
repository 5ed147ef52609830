"""What goes wrong on the way from a hub: one line each, its exit code, and nothing half there."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from advmoe_deploy.errors import MachineError
from advmoe_deploy.hub.faults import Repository, explained
from advmoe_deploy.zoo import download
from advmoe_deploy.zoo.download import _linked
from tests.zoo.hub_commands import WEIGHTS, Done, files_in, refused
from tests.zoo.hub_server import Hub, sha256


def test_without_a_network(
    hub: Hub, advmoe: Callable[..., Done], resolved: Callable[..., Done], trained_run: Path
) -> None:
    hub.put("me/tiny", files_in(trained_run))
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    offline = {"HF_HUB_OFFLINE": "1"}
    refused(advmoe("inspect", "hub:me/tiny", **gone), 5, "127.0.0.1:9 cannot be reached", "network")
    refused(advmoe("inspect", "hub:me/tiny", **offline), 5, "HF_HUB_OFFLINE", "unset it")
    found = resolved("hub:me/tiny").stdout
    assert found.endswith("/tiny\n")
    for variables in (gone, offline):
        done = resolved("hub:me/tiny", **variables)
        assert (done.stdout, done.stderr) == (found, "")


def test_a_hub_in_trouble(hub: Hub, advmoe: Callable[..., Done]) -> None:
    hub.status = 500
    refused(advmoe("inspect", "hub:me/tiny"), 5, "HTTP 500", "try again later")


def test_half_a_file_is_refused_and_not_kept(
    hub: Hub, advmoe: Callable[..., Done], tmp_path: Path
) -> None:
    hub.put("me/tiny", {"model/checkpoint.json": b"{}", WEIGHTS: os.urandom(5000)})
    hub.short = WEIGHTS
    refused(advmoe("inspect", "hub:me/tiny"), 5, "hub:me/tiny@", "came only in part", "try again")
    assert not list(tmp_path.rglob("weights.safetensors"))


@pytest.mark.slow
def test_half_a_file_is_not_taken_for_a_whole_one(
    hub: Hub,
    advmoe: Callable[..., Done],
    resolved: Callable[..., Done],
    trained_run: Path,
    tmp_path: Path,
) -> None:
    hub.put("me/tiny", files_in(trained_run))
    hub.cut = WEIGHTS
    refused(advmoe("inspect", "hub:me/tiny"), 5, "hub:me/tiny@", "try again")
    assert not list(tmp_path.rglob("weights.safetensors"))
    refused(advmoe("inspect", "hub:me/tiny", HF_HUB_OFFLINE="1"), 5, "not whole in the cache")
    hub.cut = ""
    assert resolved("hub:me/tiny").returncode == 0


def test_a_full_disk(hub: Hub, advmoe: Callable[..., Done], small_disk: Path) -> None:
    checkpoint = {"model/checkpoint.json": b"{}"}
    hub.put("me/large", {**checkpoint, WEIGHTS: os.urandom(1 << 20)})
    done = advmoe("inspect", "hub:me/large", HF_HOME=str(small_disk))
    refused(done, 5, "disk of the hub's cache is full", "HF_HOME")


def test_a_full_disk_of_our_own_cache(
    hub: Hub, advmoe: Callable[..., Done], small_disk: Path
) -> None:
    weights = os.urandom(1 << 20)
    checkpoint = json.dumps({"weights_sha256": sha256(weights)}).encode()
    hub.put("me/large", {"model/checkpoint.json": checkpoint, WEIGHTS: weights})
    done = advmoe("inspect", "hub:me/large", XDG_CACHE_HOME=str(small_disk))
    refused(done, 5, f"{small_disk}/advmoe-deploy/hub/me", "own cache is full", "XDG_CACHE_HOME")
    assert not any(files_in(small_disk).values())  # nothing but an empty lock


def test_of_a_copy_the_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where no disk can be mounted, by the error that shutil raises there."""
    source = tmp_path / "hf/commit/model/weights.safetensors"
    source.parent.mkdir(parents=True)
    source.write_bytes(b"x")

    def full(file: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file), None, str(target))

    def elsewhere(*_: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr("os.link", elsewhere)
    monkeypatch.setattr("shutil.copyfile", full)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "ours"))
    with pytest.raises(MachineError, match=r"own cache is full.*XDG_CACHE_HOME") as caught:
        _linked(Repository("me/tiny"), tmp_path / "hf/commit", [WEIGHTS])
    assert str(caught.value).startswith(f"{tmp_path}/ours/advmoe-deploy/hub/me/commit/tiny: ")
    assert not any(files_in(tmp_path / "ours").values())  # nothing but an empty lock


def test_without_a_home_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MachineError, match="set XDG_CACHE_HOME"):
        _linked(Repository("me/tiny"), Path("commit"), [])


def test_who_asks_at_once_links_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one would take away the folder that another was just given."""
    commit, names, linked = tmp_path / "hf/commit", ["a.json", "b.json"], []
    commit.mkdir(parents=True)
    for name in names:
        (commit / name).write_text(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "ours"))

    def slowly(file: Path, target: Path) -> None:
        linked.append(file.name)
        time.sleep(0.1)  # so that all are on their way
        os.link(file, target)

    monkeypatch.setattr(download, "_link", slowly)
    start = Barrier(3)

    def ask(_: int) -> Path:
        start.wait()
        return _linked(Repository("me/tiny"), commit, names)

    with ThreadPoolExecutor(3) as pool:
        (found,) = {*pool.map(ask, range(3))}
    assert linked == names
    assert {*files_in(found)} == {*names}


def test_what_the_clients_own_transport_raises() -> None:
    said = r"hub:me/tiny: .*CAS service error.*; try again"
    with pytest.raises(MachineError, match=said), explained(Repository("me/tiny")):
        raise RuntimeError("Data processing error:\nCAS service error")


def test_a_manifest_whose_files_are_no_records(hub: Hub, advmoe: Callable[..., Done]) -> None:
    hub.put("me/tiny", {"manifest.json": b'{"files": {"model.onnx": "0"}}'})
    refused(advmoe("inspect", "hub:me/tiny"), 3, "manifest.json lists no files", "ask its owner")


def test_without_the_client_the_extra_is_named(environment: dict[str, str]) -> None:
    program = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from advmoe_deploy.cli.app import run\n"
        "sys.exit(run(['inspect', 'hub:me/tiny']))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    refused(done, 4, "pip install 'advmoe-deploy[hub]'")

"""Runs and bundles of a hub, by its real client against a hub of our own on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from advmoe_deploy.bundle import Bundle
from tests.zoo.hub_commands import WEIGHTS, Done, files_in, refused
from tests.zoo.hub_server import TOKEN, Hub


def test_a_run_is_exported_and_loaded(
    hub: Hub,
    advmoe: Callable[..., Done],
    resolved: Callable[..., Done],
    trained_run: Path,
    tmp_path: Path,
) -> None:
    others = {"pytorch_model.bin": b"a pickle", "model/odd.pkl": b"another", "README.md": b"x"}
    hub.put("me/tiny", {**files_in(trained_run), **others})
    done = advmoe("export", "hub:me/tiny@main", "--format", "onnx", "--data", "random:50")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tiny-bundle/manifest.json").is_file()
    found = Path(resolved("hub:me/tiny").stdout.strip())
    assert found.name == "tiny"
    assert set(files_in(found)) == {WEIGHTS, "model/checkpoint.json"}
    cached = [file for file in (tmp_path / "hf").rglob("*") if file.is_symlink()]
    assert {file.name for file in cached} == {"weights.safetensors", "checkpoint.json"}
    before = len(hub.requests)
    program = "import advmoe_deploy; print(advmoe_deploy.load_model('hub:me/tiny').spec.family)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **_offline(hub, tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "advmoe\n"
    assert len(hub.requests) == before


def _offline(hub: Hub, home: Path) -> dict[str, str]:
    return {
        "HOME": str(home),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
    }


@pytest.mark.slow
def test_a_bundle_is_opened_without_torch(
    hub: Hub, environment: dict[str, str], advmoe: Callable[..., Done], trained_bundle: Bundle
) -> None:
    hub.put("me/served", {**files_in(trained_bundle.path), "README.md": b"x", "x.pkl": b"y"})
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy, advmoe_deploy\n"
        "bundle = advmoe_deploy.open_bundle('hub:me/served')\n"
        "with advmoe_deploy.open_runner(bundle) as runner:\n"
        "    print(runner.infer(numpy.zeros((1, 1, 8, 8), 'f')).logits.shape)\n"
        "print(bundle.path.name)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "(1, 10)\nserved\n"), done.stderr
    assert not any("pkl" in request for request in hub.requests)
    refused(
        advmoe("export", "hub:me/served", "--format", "onnx"), 2, "this is a bundle", "name the run"
    )


@pytest.mark.slow
def test_a_revision_is_taken_and_an_unknown_one_named(
    hub: Hub, advmoe: Callable[..., Done], resolved: Callable[..., Done], trained_run: Path
) -> None:
    repo = hub.put("me/tiny", files_in(trained_run))
    repo.tags["v1"] = len(repo.commits) - 1
    hub.put("me/tiny", {"README.md": b"emptied"})
    sha = repo.sha(repo.tags["v1"])
    for revision in ("v1", sha):
        assert f"/{sha}/tiny" in resolved(f"hub:me/tiny@{revision}").stdout
    refused(advmoe("inspect", "hub:me/tiny@v2"), 3, "no revision 'v2'", "after @")
    refused(advmoe("inspect", "hub:me/tiny"), 3, "holds neither", "advmoe push")
    hub.put("me/tiny", {"model/checkpoint.json": files_in(trained_run)["model/checkpoint.json"]})
    refused(advmoe("inspect", "hub:me/tiny"), 3, "is not whole", f"lacks {WEIGHTS}", "its owner")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("me/nothing", "", "does not exist, or is private"),
        ("me/nothing", TOKEN, "does not exist, or is private"),
        ("me/secret", "", "hf auth login"),
        ("me/gated", TOKEN, "is gated: accept its terms"),
    ],
)
def test_what_may_not_be_read_is_one_line(
    hub: Hub, advmoe: Callable[..., Done], trained_run: Path, name: str, token: str, said: str
) -> None:
    hub.put("me/secret", files_in(trained_run), private=True)
    hub.put("me/gated", files_in(trained_run), gated=True)
    refused(advmoe("inspect", f"hub:{name}", HF_TOKEN=token), 3, f"hub:{name}", said, "HF_TOKEN")


@pytest.mark.slow
def test_a_private_repository_is_read_with_a_token(
    hub: Hub, resolved: Callable[..., Done], trained_run: Path
) -> None:
    hub.put("me/secret", files_in(trained_run), private=True)
    done = resolved("hub:me/secret", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_a_wrong_hash_says_whose_fault_it_is(
    hub: Hub,
    advmoe: Callable[..., Done],
    resolved: Callable[..., Done],
    trained_run: Path,
    trained_bundle: Bundle,
    tmp_path: Path,
) -> None:
    for source, name, kind in (
        (trained_run, WEIGHTS, "inspect"),
        (trained_bundle.path, "model.onnx", "verify"),
    ):
        files = files_in(source)
        changed = files[name][:-1] + bytes([files[name][-1] ^ 1])
        hub.put(f"me/changed-{kind}", {**files, name: changed})
        refused(advmoe(kind, f"hub:me/changed-{kind}"), 3, name, "SHA-256 differs", "its owner")
        hub.put(f"me/damaged-{kind}", files)
        assert resolved(f"hub:me/damaged-{kind}").returncode == 0
        for link in (tmp_path / "hf").rglob(Path(name).name):
            if f"damaged-{kind}" in str(link):
                link.resolve().chmod(0o644)
                link.resolve().write_bytes(changed)
        refused(
            advmoe(kind, f"hub:me/damaged-{kind}"), 3, "damaged in the cache", "delete", "try again"
        )


@pytest.mark.slow
def test_a_manifest_that_lists_code_is_refused(
    hub: Hub, advmoe: Callable[..., Done], trained_bundle: Bundle
) -> None:
    files = files_in(trained_bundle.path)
    for name in ("../outside.onnx", "/etc/passwd", "weights.pkl", "lib.so"):
        manifest = json.loads(files["manifest.json"])
        manifest["files"][name] = manifest["files"]["model.onnx"]
        hub.put("me/odd", {**files, "manifest.json": json.dumps(manifest).encode()})
        refused(advmoe("inspect", "hub:me/odd"), 3, name, "no export writes")

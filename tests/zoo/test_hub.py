"""Runs and bundles of a hub, by its real client against a hub of our own on this machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from advmoe_deploy.bundle import Bundle
from tests.zoo.hub_server import TOKEN, Hub, running_hub

Done = subprocess.CompletedProcess[str]
WEIGHTS = "model/weights.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Nothing of the user's: another home, and a hub on this machine."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "ADVMOE_", "XDG_"))}
    return {
        **kept,
        "HOME": str(tmp_path),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONWARNINGS": "default",
    }


@pytest.fixture
def advmoe(environment: dict[str, str], tmp_path: Path) -> Callable[..., Done]:
    """The command line in a process of its own, where the client reads its environment."""

    def run(*arguments: str, **variables: str) -> Done:
        command = [sys.executable, "-m", "advmoe_deploy.cli.app", *arguments]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def resolved(environment: dict[str, str]) -> Callable[..., Done]:
    """What the resolver answers in a process of its own, which loads no torch and so is quick."""
    program = (
        "import sys; from advmoe_deploy.zoo.resolve import resolve as r; print(r(sys.argv[1]))"
    )

    def run(source: str, **variables: str) -> Done:
        return subprocess.run(
            [sys.executable, "-c", program, source],
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def refused(done: Done, code: int, *said: str) -> None:
    """Check that it ended with ``code`` and one line that says all of ``said``."""
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert all(each in line for each in said), line
    assert done.stdout == ""


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


@pytest.mark.slow
def test_a_hub_in_trouble(hub: Hub, advmoe: Callable[..., Done]) -> None:
    hub.status = 500
    refused(advmoe("inspect", "hub:me/tiny"), 5, "HTTP 500", "try again later")


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


@pytest.mark.slow
def test_a_full_disk(hub: Hub, advmoe: Callable[..., Done], small_disk: Path) -> None:
    checkpoint = {"model/checkpoint.json": b"{}"}
    hub.put("me/large", {**checkpoint, WEIGHTS: os.urandom(1 << 20)})
    done = advmoe("inspect", "hub:me/large", HF_HOME=str(small_disk))
    refused(done, 5, "disk of the hub's cache is full", "HF_HOME")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB, where this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount") or "mount"
    command = [mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_without_the_client_the_extra_is_named(environment: dict[str, str]) -> None:
    program = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from advmoe_deploy.cli.app import run\n"
        "sys.exit(run(['inspect', 'hub:me/tiny']))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    refused(done, 4, "pip install 'advmoe-deploy[hub]'")

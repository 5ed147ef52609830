"""Data sets of the hub, by its real client from a hub of our own on this machine."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from advmoe_deploy.data.registry import load_dataset
from tests.data.images import write_table
from tests.data.layouts import TEST, TRAIN
from tests.zoo.hub_commands import Done, files_in, refused
from tests.zoo.hub_server import Hub

NOWHERE = "http://127.0.0.1:9"
TABLES = {
    "train": "plain_text/train-00000-of-00001.parquet",
    "test": "plain_text/test-00000-of-00001.parquet",
}


@pytest.fixture
def cifar10(hub: Hub, tmp_path: Path) -> Path:
    """Thirty images as the hub has CIFAR-10, in a repository of its name and in this folder."""
    folder = tmp_path / "tables"
    write_table(folder / TABLES["train"], TRAIN)
    write_table(folder / TABLES["test"], TEST)
    hub.put(
        "uoft-cs/cifar10",
        {**files_in(folder), "README.md": b"x", "cifar10.py": b"y", "old/latest-0.parquet": b"z"},
    )
    return folder


@pytest.fixture
def read(python: Callable[..., Done]) -> Callable[..., Done]:
    """The SHA-256 of the test images that a loader returns, in a process without torch."""
    program = (
        "import hashlib, sys\n"
        "from advmoe_deploy.data import registry\n"
        "from advmoe_deploy.errors import AdvMoEError\n"
        "try:\n"
        "    loaded = getattr(registry, sys.argv[1])('cifar10')\n"
        "except AdvMoEError as error:\n"
        "    print(error, file=sys.stderr)\n"
        "    sys.exit(error.exit_code)\n"
        "test = getattr(loaded, 'test', loaded)\n"
        "print(hashlib.sha256(test.images.tobytes()).hexdigest())\n"
    )

    return lambda loader="load_dataset", **more: python("-c", program, loader, **more)


def test_tables_come_from_the_hub_once(
    hub: Hub, cifar10: Path, read: Callable[..., Done], tmp_path: Path
) -> None:
    images = load_dataset(f"cifar10:{cifar10}").test.images
    expected = f"{hashlib.sha256(images.tobytes()).hexdigest()}\n"
    alone = read("load_test_split")
    assert (alone.stdout, alone.stderr) == (expected, "")
    assert not any(TABLES["train"] in request for request in hub.requests)
    whole = read()
    assert (whole.stdout, whole.stderr) == (expected, "")
    cached = {link.name for link in (tmp_path / "hf").rglob("*") if link.is_symlink()}
    assert cached == {Path(name).name for name in TABLES.values()}
    later = read(HF_ENDPOINT=NOWHERE)
    assert (later.stdout, later.stderr) == (expected, "")


def test_data_without_a_network_are_one_line(read: Callable[..., Done]) -> None:
    refused(
        read(HF_ENDPOINT=NOWHERE),
        5,
        f"uoft-cs/cifar10: {NOWHERE} cannot be reached",
        "check the network, or pass --data cifar10:PATH or set ADVMOE_DATA",
    )


def test_data_that_the_hub_does_not_have_are_one_line(read: Callable[..., Done]) -> None:
    refused(read(), 3, "uoft-cs/cifar10 does not exist, or is private", "--data cifar10:PATH")


@pytest.mark.slow
def test_an_export_without_data_or_network(advmoe: Callable[..., Done], tmp_path: Path) -> None:
    done = advmoe("export", "zoo:cifar10-advmoe", "--format", "onnx", HF_ENDPOINT=NOWHERE)
    assert done.returncode == 5
    said = [line for line in done.stderr.splitlines() if "cannot be reached" in line]
    assert said == done.stderr.splitlines()[-1:]
    assert "--data random:1000" in said[0]
    assert not (tmp_path / "cifar10-advmoe-bundle").exists()

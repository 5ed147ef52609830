"""A hub on this machine, and processes that ask it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.zoo.hub_commands import Done
from tests.zoo.hub_server import Hub, running_hub


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
def python(environment: dict[str, str], tmp_path: Path) -> Callable[..., Done]:
    """Python in a process of its own, where the client reads its environment."""

    def run(*arguments: str, **variables: str) -> Done:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def advmoe(python: Callable[..., Done]) -> Callable[..., Done]:
    """The command line, in a process of its own."""
    return partial(python, "-m", "advmoe_deploy.cli.app")


@pytest.fixture
def resolved(python: Callable[..., Done]) -> Callable[..., Done]:
    """What the resolver answers, in a process that loads no torch and so is quick."""
    program = (
        "import sys; from advmoe_deploy.zoo.resolve import resolve as r; print(r(sys.argv[1]))"
    )
    return partial(python, "-c", program)


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

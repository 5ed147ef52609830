"""The wheel, in an environment that has nothing else: no checkout, no torch, no extras at first."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from advmoe_deploy.cli.app import run
from tests.packaging.source import source_in, wheel_of

pytestmark = pytest.mark.slow
Program = Callable[..., subprocess.CompletedProcess[str]]
_INSTALL = re.compile(r"run: (pip install '[^']+')")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel_of(source_in(tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def shell(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """A shell outside of the checkout whose Python has the wheel and what that asks for."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    own = {key: text for key, text in os.environ.items() if key != "PYTHONPATH"}
    own["PATH"] = f"{folder / 'venv' / 'bin'}{os.pathsep}{own['PATH']}"

    def ask(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line], cwd=folder, env=own, capture_output=True, text=True, check=False
        )

    if ask("pip install --quiet numpy").returncode:
        pytest.skip("no package index within reach")
    installed = ask(f"pip install --quiet {wheel}")
    assert installed.returncode == 0, installed.stderr
    return ask


def test_what_needs_no_extra_runs(shell: Program) -> None:
    assert "Train, export, verify" in shell("advmoe --help").stdout
    assert "cifar10-advmoe" in shell("advmoe list models").stdout
    assert "/venv/" in shell("python -c 'import advmoe_deploy; print(advmoe_deploy)'").stdout


def test_an_extra_is_added_as_the_error_says(shell: Program, tmp_path: Path) -> None:
    exported = ["export", "zoo:cifar10-advmoe", "--format", "onnx", "--data", "random:20"]
    bundle, photo = tmp_path / "bundle", tmp_path / "photo.png"
    assert run([*exported, "--out", str(bundle)]) == 0
    Image.new("RGB", (32, 32), "navy").save(photo)
    refused = shell(f"advmoe predict {bundle} {photo}")
    assert refused.returncode == 4, refused.stderr
    (line,) = _INSTALL.findall(refused.stderr)
    added = shell(line)  # this package is on no index: pip takes the one that is there
    assert added.returncode == 0, added.stderr
    answered = shell(f"advmoe predict {bundle} {photo}")
    assert answered.returncode == 0, answered.stderr
    assert "airplane" in answered.stdout + answered.stderr
    assert shell("python -c 'import torch'").returncode

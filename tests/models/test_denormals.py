"""Denormal weights: counted, written as zeros, and zeros to PyTorch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn

from advmoe_deploy.bundle import CARD, MODEL, open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.files import sha256_of
from advmoe_deploy.models.checkpoint import CHECKPOINT, WEIGHTS
from advmoe_deploy.models.denormals import zero_denormals
from tests.conftest import TINY, write_run


def test_denormals_are_counted_and_zeros() -> None:
    """Of 1, 0, -0, the least normal number, the largest denormal and, negative, the least one."""
    values = [0x3F800000, 0, -0x80000000, 0x00800000, 0x007FFFFF, -0x7FFFFFFF]
    model = nn.Linear(6, 1, bias=False)
    bits = model.weight.detach().view(torch.int32)
    bits.copy_(torch.tensor([values]))
    assert zero_denormals(model) == 2
    assert bits.tolist() == [[0x3F800000, 0, -0x80000000, 0x00800000, 0, 0]]
    assert zero_denormals(model) == 0


def test_every_thread_of_pytorch_flushes() -> None:
    """In a process of its own, with two threads."""
    code = (
        "import torch; torch.set_num_threads(2); import advmoe_deploy.models.base\n"
        "halves = torch.full((2_000_000,), 1000, dtype=torch.int32).view(torch.float32) * 0.5\n"
        "print(int(halves.view(torch.int32).count_nonzero()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


@pytest.fixture
def decayed(tmp_path: Path) -> tuple[Path, int]:
    """A run with half the channels of every wide convolution decayed, and how many weights."""
    path = write_run(tmp_path / "run", TINY)
    weights, about = path / "model" / WEIGHTS, path / "model" / CHECKPOINT
    state, count = load_file(weights), 0
    for tensor in state.values():
        if tensor.dim() == 4:
            half = tensor[: len(tensor) // 2]
            half.view(torch.int32).fill_(1000)  # a denormal: 1e-42
            count += half.numel()
    save_file(state, weights)
    fields = json.loads(about.read_text()) | {"weights_sha256": sha256_of(weights)}
    about.write_text(json.dumps(fields))
    return path, count


def test_an_export_says_how_many_there_are(
    decayed: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    path, count = decayed
    assert run(["export", str(path), "--format", "onnx", "--json"]) == 0
    out, err = capsys.readouterr()
    note = f"{count:,} weights decayed to denormal numbers"
    assert json.loads(out)["denormal_weights"] == count
    assert note in " ".join(err.split())
    bundle = open_bundle(path / "bundle")
    assert bundle.manifest.denormal_weights == count
    assert note in bundle.file(CARD).read_text()
    for tensor in onnx.load_model(bundle.file(MODEL)).graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            bits = numpy_helper.to_array(tensor).view(np.int32)
            assert not ((bits & 0x7F800000 == 0) & (bits & 0x007FFFFF != 0)).any()
    assert run(["verify", str(path / "bundle"), "--images", "4", "--allow-fragile"]) == 0


def test_an_export_without_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path / "run", TINY)
    assert run(["export", str(path), "--format", "onnx", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["denormal_weights"] == 0
    assert "denormal" not in err

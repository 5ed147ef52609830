"""Runs that are killed, interrupted or run out of disk, in processes of their own."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from advmoe_deploy.models.checkpoint import load_checkpoint

# Slow enough to be caught in the middle of an epoch; "fill" leaves no room after epoch 2.
CHILD = """
import resource, sys, time
from pathlib import Path
import numpy as np
import torch
from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import AdvMoEError
from advmoe_deploy.progress import Silent
from advmoe_deploy.train.run.loop import train
from advmoe_deploy.train.recipes import apply_overrides, recipe

torch.set_num_threads(1)
run, *words = sys.argv[1:]
digits = load_dataset("digits")
data = Dataset(
    "digits",
    digits.class_names,
    digits.train.take(np.arange(64)),
    digits.holdout.take(np.arange(20)),
    digits.test.take(np.arange(20)),
)
config = apply_overrides(
    recipe("digits-advmoe"),
    ["model.width=4", "model.router_width=2", "epochs=5", "batch_size=16", "attack_steps=1",
     "holdout_attack_steps=1", "test_attack_steps=1", "evaluate_every=1", "ema_decay=0.9",
     "crop_padding=1", "flip=true"],
)

class Listener(Silent):
    def advance(self, task, steps=1, **figures):
        if "slow" in words and steps and task == "train":
            time.sleep(0.1)
        if "fill" in words and figures.get("epoch") == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

try:
    train(config, data, Path(run), resume="resume" in words, progress=Listener())
except AdvMoEError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start(run: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(run), *words], stderr=subprocess.PIPE, text=True
    )


def finish(run: Path, *words: str) -> str:
    with start(run, *words) as child:
        _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    return errors


def stop_in_epoch_3(run: Path, number: signal.Signals) -> int:
    with start(run, "slow") as child:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "epoch-0002").exists():
            assert child.poll() is None, child.stderr
            assert time.monotonic() < deadline, "no second checkpoint came"
            time.sleep(0.02)
        time.sleep(0.15)
        child.send_signal(number)
        child.communicate(timeout=60)
    return child.returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish(run)
    return run


def metrics(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_run(run: Path, other: Path) -> None:
    for name in ("model/weights.safetensors", "checkpoints/epoch-0005/resume.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    assert metrics(run) == metrics(other)
    assert [line["epoch"] for line in metrics(run)] == [1, 2, 3, 4, 5]


def test_a_killed_run_goes_on_to_the_same_weights(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert stop_in_epoch_3(run, signal.SIGKILL) == -signal.SIGKILL
    assert not (run / "model").exists()
    finish(run, "resume")
    assert_same_run(run, uninterrupted)


def test_ctrl_c_leaves_the_last_checkpoint_and_nothing_half_written(
    uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert stop_in_epoch_3(run, signal.SIGINT) != 0
    assert not (run / "model").exists()
    assert not list(run.rglob(".*"))
    load_checkpoint(run / "checkpoints" / "epoch-0002")
    finish(run, "resume")
    assert_same_run(run, uninterrupted)


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_half_written(
    uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with start(run, "fill") as child:
        _, errors = child.communicate(timeout=120)
    assert child.returncode == 5, errors
    assert "file size limit" in errors.splitlines()[-1]
    assert not list(run.rglob(".*"))
    load_checkpoint(run / "checkpoints" / "epoch-0002")
    finish(run, "resume")
    assert_same_run(run, uninterrupted)

"""Runs that are killed, interrupted or run out of disk, in processes of their own."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.train.run.loop import train
from tests.toy_training import some_digits, tiny

ROOT = Path(__file__).parent.parent.parent
RECIPE = ("digits-advmoe", "epochs=5", "ema_decay=0.9", "crop_padding=1", "flip=true")
# Slow enough to be caught in the middle of an epoch; "fill" leaves no room after epoch 2.
CHILD = """
import json, resource, sys, time
from pathlib import Path
import torch
from advmoe_deploy.errors import AdvMoEError
from advmoe_deploy.progress import Silent
from advmoe_deploy.train.run.loop import train
from tests.toy_training import some_digits, tiny

torch.set_num_threads(1)
run, recipe, trouble = sys.argv[1:]

class Listener(Silent):
    def advance(self, task, steps=1, **figures):
        if trouble == "slow" and steps and task == "train":
            time.sleep(0.15)
        if trouble == "fill" and figures.get("epoch") == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

try:
    train(tiny(*json.loads(recipe)), some_digits(), Path(run), progress=Listener())
except AdvMoEError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start(run: Path, trouble: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(run), json.dumps(RECIPE), trouble]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def finish(run: Path, *, resume: bool = True) -> None:
    """Train to the end, in this process."""
    train(tiny(*RECIPE), some_digits(), run, resume=resume)


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
    finish(run, resume=False)
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
    finish(run)
    assert_same_run(run, uninterrupted)


def test_ctrl_c_leaves_the_last_checkpoint_and_nothing_half_written(
    uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert stop_in_epoch_3(run, signal.SIGINT) != 0
    assert not (run / "model").exists()
    assert not list(run.rglob(".*"))
    load_checkpoint(run / "checkpoints" / "epoch-0002")
    finish(run)
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
    finish(run)
    assert_same_run(run, uninterrupted)

"""A run's state that is not that of its checkpoint is refused, and nothing is written."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import CheckpointError
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.train.run.folder import RESUME, STATE, RunFolder, RunState
from advmoe_deploy.train.run.loop import train
from advmoe_deploy.train.run.report import EpochRecord
from tests.toy_training import tiny


@pytest.fixture(scope="module")
def data() -> Dataset:
    digits = load_dataset("digits")
    few = np.arange(32)
    return Dataset(
        "digits",
        digits.class_names,
        digits.train.take(few),
        digits.holdout.take(few),
        digits.test.take(few),
    )


@pytest.fixture(scope="module")
def finished(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs. Read it only."""
    run = tmp_path_factory.mktemp("runs") / "run"
    train(tiny(), data, run)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(run: Path) -> dict[str, bytes]:
    return {str(f.relative_to(run)): f.read_bytes() for f in run.rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": -5},
        {"epoch": 0},
        {"epoch": 1},
        {"epoch": 3},
        {"best_epoch": -1},
        {"best_epoch": 3},
        {"history": []},
    ],
    ids=str,
)
def test_a_state_of_another_epoch_is_refused(
    run: Path, data: Dataset, changes: dict[str, object]
) -> None:
    file = run / "checkpoints/epoch-0002" / STATE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    before = contents(run)
    with pytest.raises(CheckpointError, match="cannot resume") as caught:
        train(tiny(), data, run, resume=True)
    assert "\n" not in str(caught.value)
    assert "go on from the checkpoint before it" in str(caught.value)
    assert contents(run).keys() == before.keys()
    assert contents(run)["metrics.jsonl"] == before["metrics.jsonl"]


def test_a_state_of_many_brackets_is_refused(run: Path, data: Dataset) -> None:
    (run / "checkpoints/epoch-0002" / STATE).write_bytes(b"[" * 100_000)
    with pytest.raises(CheckpointError, match="is no JSON"):
        train(tiny(), data, run, resume=True)


def test_a_momentum_of_another_shape_is_refused(run: Path, data: Dataset) -> None:
    folder = run / "checkpoints/epoch-0002"
    tensors = load_file(folder / RESUME)
    name = next(n for n, t in tensors.items() if t.dim() == 4 and t.shape[0] > 1)
    tensors[name] = tensors[name][:1].clone()  # which copies into every row
    save_file(tensors, folder / RESUME)
    state = json.loads((folder / STATE).read_text())
    state["resume_sha256"] = hashlib.sha256((folder / RESUME).read_bytes()).hexdigest()
    (folder / STATE).write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="has shape") as caught:
        train(tiny(), data, run, resume=True)
    assert "\n" not in str(caught.value)


def test_without_the_newest_checkpoint_the_best_of_the_one_before_is_there(
    finished: Path, tmp_path: Path
) -> None:
    checkpoint, model = load_checkpoint(finished / "model")
    folder, state = RunFolder(tmp_path), RunState(epoch=0, best_epoch=0, history=(), seconds=0)
    for epoch, accuracy in enumerate((0.1, 0.5, 0.2, 0.3, 0.9), start=1):
        record = EpochRecord(epoch=epoch, loss=1, robust_accuracy=accuracy, seconds=1)
        state = state.after(record, 1)
        folder.save(state, checkpoint, model, {})
    assert folder.epochs() == [2, 4, 5]
    shutil.rmtree(folder.checkpoint(5))  # as the error of a damaged one says
    loaded = folder.load()
    assert loaded is not None
    assert folder.checkpoint(loaded[0].best_epoch).is_dir()

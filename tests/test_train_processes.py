"""Several processes train what one does."""

from pathlib import Path

import pytest
from toy_training import some_digits, tiny

from advmoe_deploy.errors import DivergedError
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.train.loop import train


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    config = tiny("digits-advmoe", "epochs=1")
    report = train(config, some_digits(), tmp_path / "run", devices=2)
    assert report.devices == 2
    assert report.images == 30
    assert sum(report.expert_load["router"]) == 30
    load_checkpoint(tmp_path / "run" / "model")


def test_an_error_in_a_process_comes_back_as_itself(tmp_path: Path) -> None:
    config = tiny("digits-dense", "epochs=1", "lr=1e30", "schedule=cosine")
    with pytest.raises(DivergedError, match="no checkpoint yet"):
        train(config, some_digits(), tmp_path / "run", devices=2)

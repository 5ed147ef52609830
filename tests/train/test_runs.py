"""Whole runs: what they leave, what they refuse, how they end badly."""

import errno
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from advmoe_deploy.data.dataset import Dataset, Split
from advmoe_deploy.errors import CheckpointError, DivergedError, UsageError
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.progress import Silent
from advmoe_deploy.train.data.schedule import lr_factor
from advmoe_deploy.train.recipes import apply_overrides, recipe
from advmoe_deploy.train.run import session
from advmoe_deploy.train.run.data import RunData
from advmoe_deploy.train.run.folder import open_run
from advmoe_deploy.train.run.loop import train
from advmoe_deploy.train.run.place import require_place
from advmoe_deploy.train.step import learner
from tests.toy_training import TINY, some_digits, tiny


def test_a_large_split_is_measured_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny(), some_digits(), tmp_path / "whole")
    monkeypatch.setattr(session, "_MEASURED_AT_ONCE", 7 * 64)
    parts = train(tiny(), some_digits(), tmp_path / "parts")
    assert (parts.images, parts.clean_accuracy) == (30, whole.clean_accuracy)
    assert parts.expert_load == whole.expert_load
    assert parts.robust_accuracy == pytest.approx(whole.robust_accuracy, abs=0.1)


def test_a_run_leaves_a_model_a_line_per_epoch_and_two_checkpoints(tmp_path: Path) -> None:
    config = tiny("digits-advmoe", "epochs=4")
    report = train(config, some_digits(), tmp_path / "run")
    run = tmp_path / "run"
    assert json.loads((run / "report.json").read_text()) == report.model_dump(mode="json")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert all(1 <= line["effective_routes"] <= 2 for line in lines)
    best = max(lines, key=lambda r: (r["robust_accuracy"], r["clean_accuracy"], r["epoch"]))
    assert report.selected_epoch == best["epoch"]
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    before = max(lines[:3], key=lambda r: (r["robust_accuracy"], r["clean_accuracy"], r["epoch"]))
    assert kept == {f"epoch-{e:04d}" for e in {3, 4, report.selected_epoch, before["epoch"]}}
    checkpoint, model = load_checkpoint(run / "model")
    assert checkpoint.provenance["data"] == "digits"
    assert checkpoint.recipe == config.model_dump(mode="json")
    assert isinstance(model, AdvMoE)
    assert set(checkpoint.metrics) == {
        "clean_accuracy",
        "pgd_accuracy",
        "robust_accuracy",
        "effective_routes",
    }
    assert all(line["robust_accuracy"] <= line["pgd_accuracy"] for line in lines)
    assert report.robust_accuracy <= report.pgd_accuracy
    assert list((run / "tensorboard").iterdir())
    assert not list(run.rglob(".*"))
    assert report.images == 30
    assert report.robust_accuracy <= report.clean_accuracy
    assert report.effective_routes is not None


def test_a_dense_run_has_no_routes(tmp_path: Path) -> None:
    report = train(tiny("digits-s-dense", "epochs=1"), some_digits(), tmp_path / "run")
    assert report.effective_routes is None
    assert report.expert_load == {}


def test_the_cifar10_recipe_runs_in_reduced_precision(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def noise(n: int) -> Split:
        images = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        return Split(images, np.arange(n, dtype=np.int64) % 10)

    data = Dataset("cifar10:noise", tuple("abcdefghij"), noise(12), noise(4), noise(4))
    settings = ["model.width=4", "model.router_width=2", "precision=bf16-mixed", "epochs=1"]
    config = apply_overrides(recipe("cifar10-resnet18-advmoe"), [*TINY, *settings])
    report = train(config, data, tmp_path / "run")
    assert report.data == "cifar10:noise"
    _, model = load_checkpoint(tmp_path / "run" / "model")
    assert all(t.dtype != torch.bfloat16 for t in model.state_dict().values())


def test_a_run_in_the_way_is_refused(tmp_path: Path) -> None:
    config, data, run = tiny("digits-dense", "epochs=1"), some_digits(), tmp_path / "run"
    train(config, data, run)
    with pytest.raises(UsageError, match="finished run; pass --overwrite"):
        train(config, data, run)
    with pytest.raises(UsageError, match=r"trained with lr=0\.02"):
        train(apply_overrides(config, ["lr=0.5"]), data, run, resume=True)
    with pytest.raises(UsageError, match="no run to resume"):
        train(config, data, tmp_path / "new", resume=True)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.png").touch()
    with pytest.raises(UsageError, match="is no run"):
        train(config, data, other, overwrite=True)
    assert (other / "holiday.png").exists()
    train(config, data, run, overwrite=True)


def test_data_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = some_digits()
    with pytest.raises(UsageError, match=r"model\.image_size"):
        train(recipe("cifar10-resnet18-advmoe"), data, tmp_path / "run")
    with pytest.raises(UsageError, match="num_classes=10"):
        train(tiny("digits-dense", "model.num_classes=7"), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_where_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    data, run = some_digits(), tmp_path / "run"

    class Vandal(Silent):
        """Raises the learning rate beyond all reason once the first epoch is over."""

        def advance(self, task: str, steps: int = 1, **figures: float) -> None:
            if figures.get("epoch") == 1:
                parameters["lr"] = 1e30

    parameters: dict[str, float] = {}
    monkey = pytest.MonkeyPatch()
    monkey.setattr(
        learner,
        "lr_factor",
        lambda schedule, done: parameters.get("lr", lr_factor(schedule, done)),
    )
    try:
        with pytest.raises(DivergedError, match=r"epoch 2, step \d.*epoch-0001") as caught:
            train(tiny("digits-dense"), data, run, progress=Vandal())
    finally:
        monkey.undo()
    assert "\n" not in str(caught.value)
    load_checkpoint(run / "checkpoints" / "epoch-0001")
    assert not (run / "model").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "resume.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "change", "delete"])
def test_resume_refuses_a_damaged_checkpoint(
    finished: Path, tmp_path: Path, name: str, damage: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "checkpoints" / "epoch-0002" / name
    content = file.read_bytes()
    if damage == "delete":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(content[:-9] + b"\xff" + content[-8:])
    with pytest.raises(CheckpointError, match=r"epoch-0002.*; delete .*before it") as caught:
        train(tiny("digits-dense"), some_digits(), run, resume=True)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(tiny("digits-dense"), some_digits(), run)
    return run


def test_a_finished_run_may_be_resumed_and_stays_the_same(finished: Path) -> None:
    before = (finished / "model" / "weights.safetensors").read_bytes()
    train(tiny("digits-dense"), some_digits(), finished, resume=True)
    assert (finished / "model" / "weights.safetensors").read_bytes() == before


def test_a_run_killed_before_its_configuration_is_started_again(tmp_path: Path) -> None:
    config, run = tiny("digits-dense", "epochs=1"), tmp_path / "run"
    run.mkdir()
    finished = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    dead = int(finished.stdout)
    (run / f".config.json.partial-{platform.node()}-{dead}-0a1b2c3d").write_bytes(b"{")
    train(config, some_digits(), run)
    shutil.rmtree(run)
    run.mkdir()
    for name in ("config", "data"):  # by another machine
        (run / f".{name}.json.partial-elsewhere-1-0a1b2c3d").write_bytes(b"{")
    require_place(run, resume=False, overwrite=False)
    train(config, some_digits(), run)
    assert not list(run.rglob(".*"))


def test_a_run_that_is_a_link_is_replaced_and_stays_a_run_until_all_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data, run = tiny("digits-dense"), RunData.of(some_digits()), tmp_path / "run"
    (tmp_path / "disk").mkdir()
    run.symlink_to(tmp_path / "disk")
    open_run(run, config, data, resume=False, overwrite=False)
    (run / "checkpoints" / "epoch-0001").mkdir(parents=True)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("advmoe_deploy.train.run.folder.shutil.rmtree", killed)
        open_run(run, config, data, resume=False, overwrite=True)
    require_place(run, resume=False, overwrite=True)
    open_run(run, config, data, resume=False, overwrite=True)
    assert run.is_symlink()
    assert {file.name for file in run.iterdir()} == {"config.json", "data.json"}


def test_a_full_disk_at_the_start_leaves_nothing_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data, run = tiny("digits-dense"), RunData.of(some_digits()), tmp_path / "run"
    syncs = iter([None, OSError(errno.ENOSPC, "full")])

    def fsync(descriptor: int) -> None:
        if error := next(syncs):
            raise error

    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr("os.fsync", fsync)
        open_run(run, config, data, resume=False, overwrite=False)
    require_place(run, resume=False, overwrite=False)


def test_two_processes_never_train_in_one_folder(tmp_path: Path) -> None:
    config, data, run = tiny("digits-dense", "epochs=2"), some_digits(), tmp_path / "run"
    refused: list[str] = []

    class Other(Silent):
        def advance(self, task: str, steps: int = 1, **figures: float) -> None:
            if figures.get("epoch") == 1:
                with pytest.raises(UsageError) as caught:
                    train(apply_overrides(config, ["lr=0.5"]), data, run, overwrite=True)
                refused.append(str(caught.value))

    train(config, data, run, progress=Other())
    assert refused == [f"another process trains in {run}; stop it, or choose another --out"]
    assert json.loads((run / "config.json").read_text())["lr"] == config.lr
    train(config, data, run, overwrite=True)


def test_images_beyond_those_to_train_on_decide_nothing(tmp_path: Path) -> None:
    config = tiny(
        "digits-advmoe", "epochs=1", "train_images=16", "shared_start=0", "even_loads=true"
    )
    data = some_digits()
    train(config, data, tmp_path / "a")
    data.train.images[16:] = 255 - data.train.images[16:]
    train(config, data, tmp_path / "b")
    ours, theirs = (
        (tmp_path / name / "model" / "weights.safetensors").read_bytes() for name in "ab"
    )
    assert ours == theirs

"""A run knows its data by content: moved is fine, other is refused."""

import json
import shutil
from pathlib import Path

import pytest

from advmoe_deploy.cli.app import run
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.checkpoint import read_checkpoint
from advmoe_deploy.train.recipes import apply_overrides, recipe
from advmoe_deploy.train.run.data import RunData
from advmoe_deploy.train.run.folder import open_run
from advmoe_deploy.train.run.loop import train
from tests.data.images import write_folders, write_png
from tests.toy_training import TINY

SMALL = ["model.width=4", "model.num_classes=2", "model.image_size=32", "schedule=cosine"]
CONFIG = apply_overrides(recipe("cifar10-resnet18-dense"), [*TINY, *SMALL, "batch_size=8"])


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of one epoch on ``tmp_path/set``, named from within ``tmp_path``."""
    write_folders(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    config = apply_overrides(CONFIG, ["epochs=1"])
    train(config, load_dataset("folder:set?size=32"), tmp_path / "run")
    return tmp_path / "run"


def resume(begun: Path, source: str) -> None:
    config = apply_overrides(CONFIG, ["epochs=1"])
    train(config, load_dataset(source), begun, resume=True)


def test_a_run_keeps_where_its_data_lie_and_what_they_hold(begun: Path, tmp_path: Path) -> None:
    source = f"folder:{tmp_path}/set?size=32"
    checkpoint = read_checkpoint(begun / "model")
    known = load_dataset(source).fingerprint
    assert known is not None
    assert checkpoint.provenance["data"] == source
    assert checkpoint.provenance["fingerprint"] == known.model_dump()
    kept = json.loads((begun / "data.json").read_text())
    assert kept == {
        "source": source,
        "fingerprint": known.model_dump(),
        "class_names": ["a", "b"],
    }
    assert json.loads((begun / "config.json").read_text())["data"] == source


def test_moved_data_are_the_same(begun: Path, tmp_path: Path) -> None:
    shutil.move(tmp_path / "set", tmp_path / "new place")
    resume(begun, "folder:new place?size=32")
    moved = f"folder:{tmp_path}/new place?size=32"
    assert json.loads((begun / "config.json").read_text())["data"] == moved
    assert json.loads((begun / "data.json").read_text())["source"] == moved
    assert read_checkpoint(begun / "model").provenance["data"] == moved


def test_other_data_are_refused(begun: Path, tmp_path: Path) -> None:
    write_folders(tmp_path / "other", first=5000)
    with pytest.raises(UsageError, match="holds other images or other classes"):
        resume(begun, "folder:other?size=32")
    write_folders(tmp_path / "swapped", ("b", "a"))
    with pytest.raises(UsageError, match="in another order"):
        resume(begun, "folder:swapped?size=32")
    write_folders(tmp_path / "words", ("one", "two"))
    with pytest.raises(UsageError, match="classes were a, b and are one, two"):
        resume(begun, "folder:words?size=32")
    # In the same place, one image more.
    write_png(tmp_path / "set" / "train" / "a" / "new.png", 4321)
    with pytest.raises(UsageError, match="holds other images"):
        resume(begun, "folder:set?size=32")


def test_a_run_without_a_record_of_its_data_is_known_by_their_place(
    begun: Path, tmp_path: Path
) -> None:
    (begun / "data.json").unlink()
    config = json.loads((begun / "config.json").read_text())
    (begun / "config.json").write_text(json.dumps({**config, "data": "folder:set?size=32"}))
    resume(begun, "folder:set?size=32")
    (begun / "data.json").unlink()
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    with pytest.raises(UsageError, match="was trained with data=folder:"):
        resume(begun, "folder:copy?size=32")


def test_a_bundle_is_verified_from_another_folder(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(begun), "--format", "onnx"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    command = ["verify", str(begun / "bundle"), "--max-drop", "100", "--images", "4", "--json"]
    command += ["--allow-fragile"]
    capsys.readouterr()
    assert run(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["data"] == f"folder:{tmp_path}/set?size=32"
    (tmp_path / "set" / "val" / "a").rename(tmp_path / "set" / "val" / "c")
    (tmp_path / "set" / "train" / "a").rename(tmp_path / "set" / "train" / "c")
    assert run(command) == 2
    assert "class-map c=a" in json.loads(capsys.readouterr().out)["error"]
    assert run([*command, "--class-map", "c=a"]) == 0
    by_map = json.loads(capsys.readouterr().out)
    assert by_map["clean_accuracy"] == said["clean_accuracy"]


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_settings_and_data_of_the_run_are_compared_before_anything_is_done(
    dry: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, data = "digits-advmoe", load_dataset("digits")
    config = apply_overrides(recipe(name), ["epochs=3"])
    open_run(tmp_path / "run", config, RunData.of(data), resume=False, overwrite=False)
    command = ["train", name, "--resume", "--out", str(tmp_path / "run"), *dry]
    assert run([*command, "--epochs", "4"]) == 2
    assert "was trained with epochs=3; resume with the same" in capsys.readouterr().err
    own = [*command, "--epochs", "3", "--set"]
    assert run([*own, "test_attack_step_size=0.01"]) == 2
    assert "was trained with test_attack_step_size=null; resume" in capsys.readouterr().err
    if dry:
        assert run([*own, "test_attack_step_size=null"]) == 0
    other = [f"--data={write_folders(tmp_path / 'set')}", "--epochs", "3"]
    settings = ["model.num_classes=2", "model.image_size=8", "model.in_channels=3"]
    settings += ["model.mean=[0,0,0]", "model.std=[1,1,1]"]
    asked = [word for setting in settings for word in ("--set", setting)]
    assert run([*command, *other, *asked]) == 2
    assert "holds other images" in capsys.readouterr().err
    if dry:
        assert run([*command, "--epochs", "3"]) == 0
        assert not (tmp_path / "run" / "checkpoints").exists()

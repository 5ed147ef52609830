"""Fine-tuning: the network and its weights come along, the head where the classes are the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import AdvMoEError, CheckpointError
from advmoe_deploy.models.base import is_router_parameter
from advmoe_deploy.models.checkpoint import load_checkpoint, read_checkpoint
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.specs import build_spec
from advmoe_deploy.train.request import TrainRequest, train_request
from advmoe_deploy.train.step.transfer import head_of, transfer
from tests.data.images import write_photos
from tests.toy_training import PARTS

QUICK = ["attack_steps=1", "test_attack_steps=1", "holdout_attack_steps=1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of photographs."""
    return write_photos(tmp_path_factory.mktemp("own") / "photos")


def asked_from(path: Path, name: str = "advmoe", **more: object) -> TrainRequest:
    return train_request(name, start=(str(path), path), **more)  # type: ignore[arg-type]


def test_a_model_learns_other_classes_with_a_new_head(
    tiny_run: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    line = ["train", "advmoe", "--data", str(photos), "--from", str(tiny_run), "--epochs", "1"]
    settings = [part for setting in [*QUICK, "lr=1e-9"] for part in ("--set", setting)]
    assert run([*line, *settings, "--out", str(out), "--json"]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "but for a new head for these 3 classes" in said
    before, old = load_checkpoint(tiny_run / "model")
    after, new = load_checkpoint(out / "model")
    assert after.model == before.model.model_copy(update={"num_classes": 3})
    assert after.class_names == ("digit", "flower", "temple")
    assert after.provenance["from"] == {
        "source": str(tiny_run),
        "path": str((tiny_run / "model").resolve()),
        "weights_sha256": before.weights_sha256,
        "new_head": True,
    }
    theirs = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        if name.startswith("backbone.linear"):
            assert len(parameter) == 3
        elif not name.startswith("router"):  # whose learning rate is its own
            torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=1e-6)
    assert json.loads((out / "config.json").read_text())["shared_start"] == 0
    moved = shutil.copytree(tiny_run, tmp_path / "moved")
    line[line.index(str(tiny_run))] = str(moved)
    assert run([*line, *settings, "--out", str(out), "--resume"]) == 0
    assert "nothing is trained" in capfd.readouterr().err


def test_the_same_classes_keep_their_head(tiny_run: Path) -> None:
    asked = asked_from(tiny_run, data="digits")
    start = asked.config.start
    assert start is not None
    assert not start.new_head
    torch.manual_seed(1)
    model = build_model(asked.config.model)
    transfer(model, start)
    _, old = load_checkpoint(tiny_run / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, old.state_dict()[name]), name
    with pytest.raises(CheckpointError, match="has other weights than when the run was asked"):
        transfer(model, start.model_copy(update={"weights_sha256": "0" * 64}))


@pytest.mark.parametrize(
    ("name", "still"), [("router-only", "experts"), ("experts-only", "router")]
)
def test_what_no_step_moves_stays_as_it_came(
    tiny_run: Path, tmp_path: Path, name: str, still: str
) -> None:
    """Its weights to the bit, and what its BatchNorms have seen: they are of the model, too."""
    few = [*QUICK, "lr=0.1", "router_lr=0.01", "train_images=64", "test_images=4", "epochs=2"]
    settings = [part for setting in [*few, "evaluate_every=2"] for part in ("--set", setting)]
    line = ["train", f"digits-{name}", "--from", str(tiny_run), *settings]
    assert run([*line, "--out", str(tmp_path / "run")]) == 0
    _, before = load_checkpoint(tiny_run / "model")
    _, after = load_checkpoint(tmp_path / "run" / "model")
    theirs, moved = before.state_dict(), {"router": 0, "experts": 0}
    for tensor_name, tensor in after.state_dict().items():
        part = "router" if is_router_parameter(tensor_name) else "experts"
        moved[part] += not torch.equal(tensor, theirs[tensor_name])
    assert moved.pop(still) == 0
    assert min(moved.values()) > 0


def test_a_router_alone_cannot_learn_other_classes(tiny_run: Path, photos: Path) -> None:
    with pytest.raises(AdvMoEError, match="router-only leaves the last layer alone") as caught:
        asked_from(tiny_run, "digits-router-only", data=str(photos))
    assert "\n" not in str(caught.value)
    assert asked_from(tiny_run, "digits-experts-only", data=str(photos)).config.start


def test_a_bundle_and_the_weights_of_a_checkpoint_do_as_well(
    tiny_run: Path, tiny_bundle: Bundle, photos: Path
) -> None:
    weights = tiny_run / "model" / "weights.safetensors"
    for path in (tiny_bundle.path, weights, tiny_run / "model"):
        config = asked_from(path, data=str(photos)).config
        assert config.start is not None
        assert config.start.weights_sha256 == read_checkpoint(tiny_run / "model").weights_sha256
        assert config.model.image_shape == (1, 8, 8)
        transfer(build_model(config.model), config.start)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("dense", [], "is of family advmoe, and digits-dense trains family dense"),
        ("cifar10-vit-moe", [], "name a recipe of family advmoe"),
        ("advmoe", ["model.width=64"], "has model.width=8, not 64: the network is that of the"),
        ("advmoe", ["model.image_size=32"], "has model.image_size=8, not 32"),
        ("advmoe", ["model.foo=1"], "unknown setting 'model.foo'"),
        ("advmoe", ["model.transformer.depth=3"], "unknown setting 'model.transformer.depth'"),
        ("advmoe", ["shared_start=0.5"], "brings its experts along"),
        ("advmoe", ["model.num_classes=7"], "has 3 classes, not 7"),
    ],
)
def test_contradictions_are_one_line(
    tiny_run: Path, photos: Path, name: str, settings: list[str], says: str
) -> None:
    with pytest.raises(AdvMoEError, match=says) as caught:
        asked_from(tiny_run, name, data=str(photos), settings=settings)
    assert "\n" not in str(caught.value)


def test_the_model_that_a_run_begins_with_is_not_replaced(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(tiny_run, runs / "old")
    for folder in (runs, runs / "old"):
        (folder / "config.json").write_text("{}")
    before = {file: file.read_bytes() for file in runs.rglob("*") if file.is_file()}
    line = ["train", "advmoe", "--data", "digits", "--from", str(runs / "old"), "--overwrite"]
    for out in (runs / "old", runs):
        assert run([*line, "--dry-run", "--out", str(out)]) == 2
        assert f"lies in {out}, which would be replaced" in capfd.readouterr().err
    assert run([*line, "--epochs", "1", "--out", str(runs / "old")]) == 2
    assert {file: file.read_bytes() for file in runs.rglob("*") if file.is_file()} == before
    assert asked_from(runs / "old", data="digits", out=runs / "new", overwrite=True).config.start


def test_weights_alone_tell_no_network(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(AdvMoEError, match="says nothing of its network; name weights"):
        asked_from(tmp_path / "model.safetensors", data=str(photos))


@pytest.mark.parametrize("family", PARTS)
def test_the_head_of_each_family_is_found(family: str) -> None:
    spec = build_spec(family=family, **{"image_size": 16, "width": 4, **PARTS[family]})  # type: ignore[index]
    model = build_model(spec)
    head = head_of(spec)
    assert head
    assert all(len(model.state_dict()[name]) % spec.num_classes == 0 for name in head)

"""Names of models: which folder each leads to, and what a command makes of it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import advmoe_deploy
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import BundleError, InputError, UsageError
from advmoe_deploy.reports.checkpoint import read_checkpoint
from advmoe_deploy.zoo import places
from advmoe_deploy.zoo.entries import listed_models
from advmoe_deploy.zoo.pack import Packing, pack_run
from advmoe_deploy.zoo.places import own_folder
from advmoe_deploy.zoo.resolve import name_of, place_for, resolve
from tests.cli.command_line import Capture, answer, said


@pytest.fixture
def zoo(
    trained_run: Path, trained_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A packaged model, and the user's own: that model again under its name, a run, a bundle."""
    packaged, own, here = (tmp_path / name for name in ("packaged", "own", "here"))
    monkeypatch.setattr(places, "PACKAGED", packaged)
    monkeypatch.setenv("ADVMOE_ZOO", str(own))
    pack_run(trained_run, packaged / "tiny-advmoe", Packing(half=True))
    pack_run(trained_run, packaged / "both", Packing(half=True))
    shutil.copytree(trained_run, own / "both")
    shutil.copytree(trained_bundle.path, own / "tiny-bundle")
    (own / "notes").mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    return tmp_path


def test_a_name_leads_to_a_folder_and_a_path_wins(zoo: Path) -> None:
    packaged = zoo / "packaged/tiny-advmoe"
    assert resolve("zoo:tiny-advmoe") == resolve("tiny-advmoe") == packaged
    assert resolve("both") == zoo / "own/both"
    assert resolve(packaged) == packaged
    Path("tiny-advmoe").mkdir()
    assert resolve("tiny-advmoe") == Path("tiny-advmoe")
    assert resolve("zoo:tiny-advmoe") == packaged


def test_a_path_that_is_not_there_is_left_to_its_reader(zoo: Path) -> None:
    for missing in ("runs/nothing", "../tiny-advmoe", "missing"):
        assert resolve(missing) == Path(missing)


@pytest.mark.parametrize("name", ["zoo:tiny-advmo", "tiny-advmo", "zoo:tiny_advmoe"])
def test_a_misspelt_name_is_one_line_with_the_nearest(zoo: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"mean tiny-advmoe.*'advmoe list models'"):
        resolve(name)


@pytest.mark.parametrize("name", ["zoo:", "zoo:..", "zoo:../own/both", "zoo:.hidden", "zoo:xyzzy"])
def test_a_name_leads_nowhere_else(zoo: Path, name: str) -> None:
    with pytest.raises(UsageError, match="unknown model"):
        resolve(name)


@pytest.mark.parametrize("text", ["", "name", "a/b/c", "a/../b", "a/b@", "a/b c", "../a"])
def test_a_repository_has_a_form(text: str) -> None:
    with pytest.raises(UsageError, match="write hub:USER/NAME"):
        resolve(f"hub:{text}")


def test_where_things_go_unless_told(zoo: Path) -> None:
    own = Path("runs/a/bundle")
    assert place_for("runs/a", Path("runs/a"), "bundle", own) == own
    for source in ("zoo:tiny-advmoe", "tiny-advmoe", "hub:me/tiny-advmoe@v1"):
        found = place_for(source, Path("/cache/abc"), "bundle", own)
        assert found == Path("tiny-advmoe-bundle")
    assert name_of("runs/a/") == "a"


def test_the_folder_of_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ADVMOE_ZOO", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert own_folder() == tmp_path / "advmoe-deploy/models"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    for platform, folder in (("linux", ".local/share"), ("darwin", "Library/Application Support")):
        monkeypatch.setattr("sys.platform", platform)
        assert own_folder() == tmp_path / folder / "advmoe-deploy/models"


def test_load_model_takes_names(zoo: Path, trained_run: Path) -> None:
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = advmoe_deploy.load_model(trained_run)(images)
    for source in ("both", "zoo:both", "zoo:tiny-bundle"):
        assert torch.equal(advmoe_deploy.load_model(source)(images), whole)
    half = advmoe_deploy.load_model("tiny-advmoe")(images)
    assert torch.allclose(half, whole, atol=0.1)
    assert not torch.equal(half, whole)


def test_a_bundle_is_opened_by_name_and_a_run_is_not(zoo: Path) -> None:
    assert advmoe_deploy.open_bundle("zoo:tiny-bundle").path == zoo / "own/tiny-bundle"
    with pytest.raises(BundleError, match="advmoe export zoo:both --format onnx"):
        advmoe_deploy.open_bundle("zoo:both")


def test_commands_write_beside_the_user_not_into_the_zoo(zoo: Path, capsys: Capture) -> None:
    before = {path for place in ("own", "packaged") for path in (zoo / place).rglob("*")}
    value = answer(capsys, "export", "zoo:tiny-advmoe", "--format", "onnx")
    assert value["bundle"] == "tiny-advmoe-bundle"
    some = ["--images", "10", "--steps", "2", "--only", "routes"]
    value = answer(capsys, "analyze", "zoo:tiny-bundle", *some)
    assert value["out"] == "tiny-bundle-analysis"
    verified = answer(capsys, "verify", "tiny-advmoe-bundle", "--images", "20", "--allow-fragile")
    assert verified["passed"]  # the reference is the fp16 file itself
    assert answer(capsys, "inspect", "zoo:tiny-advmoe")["record"]["rounding"]["lost"] == 0
    assert answer(capsys, "inspect", "tiny-bundle")["bundle"] == str(zoo / "own/tiny-bundle")
    after = {path for place in ("own", "packaged") for path in (zoo / place).rglob("*")}
    assert before == after


def test_add_puts_a_run_among_ones_own(zoo: Path, trained_run: Path, capsys: Capture) -> None:
    value = answer(capsys, "add", str(trained_run), "--name", "mine", "--license", "mit")
    assert value["folder"] == str(zoo / "own/mine")
    assert value["rounding"] is None
    assert run(["add", str(trained_run), "--name", "mine"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(["add", "zoo:mine", "--name", "mine-too", "--fp16"]) == 0
    assert "zoo:mine-too" in capsys.readouterr().out


def test_add_without_a_home_names_the_way_out(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name in ("HOME", "XDG_DATA_HOME", "ADVMOE_ZOO"):
        monkeypatch.delenv(name, raising=False)
    assert run(["add", str(trained_run), "--name", "mine"]) == 2
    assert "set ADVMOE_ZOO to one" in capsys.readouterr().err
    assert [source for _, source, _ in places.models()] == ["packaged"]


def test_the_list_says_what_is_known(zoo: Path, trained_run: Path, capsys: Capture) -> None:
    metrics = read_checkpoint(trained_run / "model").metrics
    (zoo / "own/broken/model").mkdir(parents=True)
    (zoo / "own/broken/model/checkpoint.json").write_text("{")
    shutil.copytree(zoo / "own/both", zoo / "own/wrong")
    kept = json.loads((zoo / "own/wrong/model/checkpoint.json").read_text())
    kept["metrics"]["clean_accuracy"] = []
    (zoo / "own/wrong/model/checkpoint.json").write_text(json.dumps(kept))
    found = {(each.name, each.source): each for each in listed_models()}
    assert found["wrong", "own"].note == "damaged (ValidationError)"
    assert set(found) == {
        *((name, "own") for name in ("both", "broken", "tiny-bundle", "wrong")),
        *((name, "packaged") for name in ("both", "tiny-advmoe")),
    }
    tiny, bundle = found["tiny-advmoe", "packaged"], found["tiny-bundle", "own"]
    assert (tiny.data, tiny.family, tiny.epsilon) == ("digits", "advmoe", 0.05)
    assert tiny.macs == bundle.macs == 79408
    assert tiny.clean_accuracy == metrics["clean_accuracy"]
    assert tiny.robust_accuracy == metrics["robust_accuracy"]
    assert tiny.measured_on == "hold-out"
    assert tiny.bytes < found["both", "own"].bytes
    assert "is no JSON" in found["broken", "own"].note
    (listed,) = answer(capsys, "list", "models").values()
    assert [entry["name"] for entry in listed][:2] == ["both", "broken"]
    assert run(["list", "models"]) == 0
    out = capsys.readouterr().out
    assert "tiny-advmoe" in out
    assert f"{100 * metrics['robust_accuracy']:.1f} %" in out
    assert "tiny-advmoe: measured on hold-out; robust: what withstands pgd-" in " ".join(
        out.split()
    )


@pytest.mark.parametrize("text", ["{}", '{"version": 1}'])
def test_a_record_that_is_damaged_is_named(zoo: Path, capsys: Capture, text: str) -> None:
    (zoo / "packaged/tiny-advmoe/record.json").write_text(text)
    for command in (["inspect"], ["export", "--format", "onnx"], ["add", "--name", "copy"]):
        assert run([command[0], "zoo:tiny-advmoe", *command[1:]]) == 3
        assert "record.json: data: Field required" in said(capsys)
    with pytest.raises(InputError, match=r"record\.json: data: Field required"):
        pack_run(zoo / "packaged/tiny-advmoe", zoo / "copy", Packing())
    assert not os.path.lexists(zoo / "copy")


@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_the_list_says_what_is_damaged(zoo: Path, capsys: Capture, how: str) -> None:
    for file in (zoo / "own/both/model/weights.safetensors", zoo / "own/tiny-bundle/model.onnx"):
        content = file.read_bytes()
        damaged = {"cut": content[:-9], "changed": content[:-1] + bytes([content[-1] ^ 1])}
        file.unlink()
        if how in damaged:
            file.write_bytes(damaged[how])
    found = {each.name: each for each in listed_models() if each.source == "own"}
    for name in ("both", "tiny-bundle"):
        assert ("missing" if how == "gone" else "damaged") in found[name].note
        assert found[name].clean_accuracy is found[name].robust_accuracy is None
    assert run(["list", "models"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["both", "unusable", "-", "-"] in [row[:4] for row in rows]
    assert ["tiny-bundle", "unusable", "-", "-"] in [row[:4] for row in rows]
    assert not [row for row in rows if row[:2] == ["tiny-advmoe", "unusable"]]


def test_what_is_not_there_may_have_been_a_name(zoo: Path) -> None:
    for load in (advmoe_deploy.load_model, advmoe_deploy.export, advmoe_deploy.open_bundle):
        with pytest.raises(InputError, match=r"no-such; .* or a model that 'advmoe list models'"):
            load("no-such")

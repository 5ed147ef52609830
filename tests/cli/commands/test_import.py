"""``advmoe import``: a run that ``export`` takes, from the files of each of the papers' code."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from advmoe_deploy.cli.app import run
from advmoe_deploy.families import IMPORT_SOURCES
from advmoe_deploy.models.checkpoint import load_checkpoint, read_checkpoint
from advmoe_deploy.models.upstream.importer import IMPORTERS, read_released
from advmoe_deploy.specs import ThreatModel
from tests.cli.command_line import Capture
from tests.data.images import write_png
from tests.models.upstream.test_dual import released
from tests.models.upstream.test_robust_experts import released as released_experts
from tests.models.upstream.test_robust_experts import spec_of
from tests.models.upstream.test_upstream import TINY, model_of, released_of, write_released
from tests.upstream_fixture import case_of


def imported(capsys: Capture, *arguments: str) -> Any:
    assert run(["import", *arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def advmoe_file(tmp_path: Path) -> Path:
    return write_released(tmp_path / "best.pth", *released_of(model_of(TINY)))


def test_a_file_becomes_a_run_that_export_takes(
    capsys: Capture, advmoe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(advmoe_file.parent)
    said = imported(capsys, "best.pth", "--from", "advmoe", "--set", "image_size=16")
    assert said["run"] == "runs/best"
    assert said["model"]["image_size"] == 16
    assert said["macs"]["executed"] > said["macs"]["selected"]
    checkpoint, model = load_checkpoint(Path("runs/best/model"))
    assert checkpoint.provenance["file_sha256"] == said["file_sha256"]
    x_NCHW = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(model(x_NCHW), model_of(TINY)(x_NCHW))
    assert run(["export", "runs/best", "--format", "onnx"]) == 2
    assert "pass --data, or --data random:1000" in capsys.readouterr().err
    assert run(["export", "runs/best", "--format", "onnx", "--data", "random:8"]) == 0
    told = capsys.readouterr().out
    assert "next: advmoe profile runs/best/bundle; 'advmoe verify' needs --data" in told


def test_the_screen_says_what_it_is_and_what_comes_next(
    capsys: Capture, advmoe_file: Path, tmp_path: Path
) -> None:
    assert run(["import", str(advmoe_file), "--from", "advmoe", "--out", str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    assert "resnet18" in out
    # Lines are broken where the terminal ends, inside a long path even.
    command = f"advmoe export {tmp_path / 'r'} --format onnx --data random:1000"
    assert "".join(command.split()) in "".join(out.split())


def test_files_of_lightning_and_of_the_dual_model(capsys: Capture, tmp_path: Path) -> None:
    network = released_experts(spec_of(), seed=5)
    content = {"state_dict": network, "epoch": 3, "hyper_parameters": {"lr": 0.1}}
    torch.save(content, tmp_path / "last.ckpt")
    both = released(prefix="Smoe.") | released(prefix="Rmoe.")
    torch.save({"net": both, "acc": 51.2, "epoch": 9}, tmp_path / "ckpt.t7")
    for name, source, family, setting in (
        ("last.ckpt", "robust-experts", "robust-experts", "top_k=2"),
        ("ckpt.t7", "dual-model", "dual-model", "alpha=0.6"),
    ):
        out = str(tmp_path / source)
        said = imported(
            capsys, str(tmp_path / name), "--from", source, "--set", setting, "--out", out
        )
        key, value = setting.split("=")
        assert said["model"]["family"] == family
        assert said["model"][key] == float(value)
        load_checkpoint(Path(out) / "model")


def test_what_was_unwrapped_is_said_and_the_key_chooses(
    capsys: Capture, advmoe_file: Path, tmp_path: Path
) -> None:
    network = torch.load(advmoe_file)["state_dict"]
    averaged = {name: t.double() for name, t in network.items()} | {"linear.bias": torch.ones(10)}
    before = {"mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.25)}
    state = {
        f"{part}.{n}": t
        for part, tensors in (("0", before), ("1", network))
        for n, t in tensors.items()
    }
    torch.save({"state_dict": state, "model_ema": averaged}, tmp_path / "both.pth")
    arguments = [str(tmp_path / "both.pth"), "--from", "advmoe", "--out", str(tmp_path / "run")]
    assert run(["import", *arguments]) == 3
    says = capsys.readouterr().err
    assert "holds several networks, at model_ema, state_dict.1; choose one" in says
    said = imported(capsys, *arguments, "--key", "state_dict")
    assert said["unwrapped"] == ["state_dict", "1"]
    assert said["normalisation"] == ["state_dict.0.mean", "state_dict.0.std"]
    assert said["left_out"] == ["model_ema"]
    assert said["model"]["std"] == [0.25, 0.25, 0.25]
    checkpoint, _ = load_checkpoint(tmp_path / "run" / "model")
    assert checkpoint.provenance["unwrapped"] == ["state_dict", "1"]
    assert run(["import", *arguments, "--overwrite", "--key", "model_ema"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "unwrapped model_ema" in out
    assert "converted to float32 float64" in out


def test_the_sources_that_are_named_can_be_imported() -> None:
    assert {*IMPORTERS} == {*IMPORT_SOURCES}


def test_an_existing_run_stays_unless_told(capsys: Capture, advmoe_file: Path) -> None:
    out = advmoe_file.parent / "run"
    arguments = ["import", str(advmoe_file), "--from", "advmoe", "--out", str(out)]
    assert run(arguments) == 0
    before = (out / "model" / "checkpoint.json").read_bytes()
    assert run([*arguments, "--set", "image_size=64"]) == 2
    assert (out / "model" / "checkpoint.json").read_bytes() == before
    assert run([*arguments, "--set", "image_size=64", "--overwrite"]) == 0
    assert (out / "model" / "checkpoint.json").read_bytes() != before
    assert run([*arguments[:-1], str(advmoe_file.parent), "--overwrite"]) == 2
    assert "holds no model/checkpoint.json" in capsys.readouterr().err.splitlines()[-1]


def test_a_bad_file_leaves_nothing(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"no checkpoint")
    before = sorted(tmp_path.iterdir())
    arguments = ["import", str(tmp_path / "x.pth"), "--from", "advmoe"]
    assert run([*arguments, "--out", str(tmp_path / "run")]) == 3
    assert "is no file of torch.save" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("case", "source", "settings"),
    [
        ("experts-conv-layer4-e4-k2", "robust-experts", {"top_k": 2}),
        ("dual-model-resnet18-a0.7", "dual-model", {}),
    ],
)
def test_released_files_of_the_other_families(
    case: str, source: str, settings: dict[str, object], tmp_path: Path
) -> None:
    _, state, answers = case_of(case)
    content = {"state_dict" if source == "robust-experts" else "net": state, "epoch": 1}
    torch.save(content, tmp_path / "file.pt")
    model = read_released(tmp_path / "file.pt", source, settings).model
    with torch.no_grad():
        logits = model(torch.from_numpy(answers["x"]))
    np.testing.assert_allclose(logits, answers["logits"], rtol=1e-5, atol=1e-5)


@pytest.fixture
def ten_classes(tmp_path: Path) -> Path:
    """Five images of each of ten classes, by the names of the digits."""
    root = tmp_path / "photos"
    for label, name in enumerate(NAMES):
        for index in range(5):
            write_png(root / name / f"{index}.png", 10 * label + index)
    return root


NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def test_what_is_said_of_a_file_is_remembered_and_the_next_commands_work_as_printed(
    capsys: Capture, advmoe_file: Path, ten_classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(advmoe_file.parent)
    Path("names.txt").write_text("\n".join(NAMES) + "\n")
    known = ["--classes", "names.txt", "--data", "photos", "--epsilon", "8/255"]
    line = ["import", "best.pth", "--from", "advmoe", "--set", "image_size=16", *known]
    assert run([*line, "--out", "a run"]) == 0
    told = capsys.readouterr().out
    assert "zero, one, two" in told
    checkpoint = read_checkpoint(Path("a run/model"))
    assert checkpoint.class_names == tuple(NAMES)
    assert checkpoint.threat == ThreatModel(epsilon=8 / 255)
    assert checkpoint.provenance["data"] == f"folder:{ten_classes}?size=16"
    assert run(next_of(told)) == 0
    told = capsys.readouterr().out
    verify = next_of(told)
    assert verify[0] == "verify"
    # Untrained, and of ten images: whether it is robust is not the question here.
    assert run([*verify, "--images", "2", "--max-drop", "100", "--json", "--allow-fragile"]) in (
        0,
        6,
    )
    assert json.loads(capsys.readouterr().out)["threat"]["epsilon"] == 8 / 255


def test_the_data_tell_the_classes_which_is_said(
    capsys: Capture, advmoe_file: Path, ten_classes: Path
) -> None:
    out = advmoe_file.parent / "run"
    line = ["import", str(advmoe_file), "--from", "advmoe", "--set", "image_size=16"]
    assert run([*line, "--data", str(ten_classes), "--out", str(out)]) == 0
    assert "taken to be those of the data, in its order: eight, five" in capsys.readouterr().err
    assert read_checkpoint(out / "model").class_names == tuple(sorted(NAMES))


def next_of(told: str) -> list[str]:
    """Return the command that a screen ends with; lines are broken where the screen ends."""
    return shlex.split(" ".join(told.partition("next: advmoe ")[2].split()))


@pytest.mark.parametrize(
    ("known", "code", "says"),
    [
        (["--classes", "cat,dog,bird"], 2, "names 3 classes, and the model has 10"),
        (["--classes", ",".join(map(str, range(100)))], 2, "names 100 classes, and the model has"),
        (["--classes", "cat,cat"], 2, "names cat twice"),
        (["--classes", "missing.txt"], 3, "is no file; name one with a class a line"),
        (["--data", "photos3"], 2, "has 3 classes, and the model has 10"),
        (["--data", "missing/"], 3, "there is no folder "),
        (["--data", "digitz"], 2, "did you mean digits"),
        (["--data", "digits"], 2, "has images of (1, 8, 8), the model takes (3, 32, 32)"),
        (["--epsilon", "8"], 2, "write 8/255"),
    ],
)
def test_what_cannot_be_of_this_model_is_refused(
    capsys: Capture,
    advmoe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    known: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(advmoe_file.parent)
    for label in range(3):
        for index in range(5):
            write_png(Path("photos3") / str(label) / f"{index}.png", 10 * label + index)
    assert run(["import", "best.pth", "--from", "advmoe", *known]) == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert says in line
    assert line.startswith("advmoe: error: ")
    assert not Path("runs").exists()


def test_export_refuses_data_of_other_classes(
    capsys: Capture, tiny_run: Path, tmp_path: Path
) -> None:
    for label in range(3):
        for index in range(5):
            grey = np.random.default_rng([label, index]).integers(0, 255, (8, 8), np.uint8)
            file = tmp_path / "photos" / str(label) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey).save(file)
    line = ["export", str(tiny_run), "--format", "onnx", "--out", str(tmp_path / "bundle")]
    assert run([*line, "--data", str(tmp_path / "photos")]) == 2
    assert "has 3 classes, the model 10; pass --data" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()

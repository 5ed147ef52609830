"""The command line: exit codes, one line per error, one JSON object on stdout."""

import json
import shutil
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import typer

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import app, run
from advmoe_deploy.cli.examples import EXAMPLES
from advmoe_deploy.cli.options import positive_numbers
from advmoe_deploy.errors import UsageError
from advmoe_deploy.train.recipes import recipe
from tests.cli.command_line import Capture, answer, said


def test_the_version(capsys: Capture) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("advmoe 0.")


def test_a_target_whose_links_lead_in_a_circle_is_refused_in_a_line(
    capsys: Capture, tiny_bundle: Bundle, tiny_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "circle").symlink_to("circle")
    out = ["--out", str(tmp_path / "circle"), "--overwrite"]
    for command in (
        ["export", str(tiny_run)],
        ["export", str(tiny_bundle.path), "--format", "triton"],
        ["report", str(tiny_bundle.path)],
    ):
        assert run([*command, *out]) == 3
        assert said(capsys).startswith(f"advmoe: error: {tmp_path / 'circle'}: its links lead in a")
    assert (tmp_path / "circle").is_symlink()


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_ends_with_examples(capsys: Capture, command: str) -> None:
    assert run([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json" in out
    for example in EXAMPLES[command]:
        assert f"  {example}\n" in out


def test_every_command_has_examples() -> None:
    group: Any = typer.main.get_command(app)
    assert set(group.commands) == set(EXAMPLES)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "nope"], 2, "unknown recipe 'nope'"),
        (["train", "digits-advmo"], 2, "did you mean digits-advmoe"),
        (["train", "digits-dense", "--set", "epoch=3"], 2, "did you mean epochs"),
        (["train", "digits-dense", "--data", "digitz"], 2, "did you mean digits"),
        (["train", "digits-dense", "--devices", "0"], 2, "see 'advmoe train --help'"),
        (["train", "digits-dense", "--set"], 2, "see 'advmoe train --help'"),
        (["train", "digits-dense", "--set", "seed=true"], 2, "seed: true is no number; write 1"),
        (["train", "digits-dense", "--set", "model.mean=[true]"], 2, "model.mean: true is no"),
        (["export", "x", "--set-build"], 2, "see 'advmoe export --help'"),
        (["export", "x", "--format", "trt", "--set-build", "batch.max=true"], 2, "batch.max: true"),
        (["import", "missing", "--from", "advmoe", "--set", "width=true"], 2, "no number; write"),
        (["train"], 2, "RECIPE"),
        (["trian"], 2, "Did you mean 'train'? See 'advmoe --help'"),
        (["--nonsense"], 2, "see 'advmoe --help'"),
        (["import", "missing", "--from", "advmoe"], 3, "missing is no file"),
        (["import", "missing", "--from", "advmo"], 2, "did you mean advmoe"),
        (["import", "missing", "--from", "advmoe", "--set", "x"], 2, "no KEY=VALUE"),
        (["export", "missing", "--format", "onx"], 2, "unknown format 'onx'; did you mean onnx"),
        (["export", "missing", "--format", "pickle"], 2, "unknown format 'pickle'"),
        (["export", "missing", "--format", "wbe"], 2, "did you mean web?"),
        (["export", "x", "--format", "onnx", "--precision", "int9"], 2, "did you mean int8"),
        (["export", "x", "--format", "onnx", "--precision", "bf16"], 2, "does not compute in bf16"),
        (["export", "missing", "--format", "onnx"], 3, "there is no run missing; name what"),
        (["inspect", "missing"], 3, "there is no bundle missing; name a"),
        (["verify", "missing"], 3, "there is no bundle missing; name a"),
        (["verify", "missing", "--max-drop", "-1"], 2, "max-drop"),
        (
            ["verify", "missing", "--epsilon", "8"],
            2,
            "outside (0, 1], in [0, 1] pixels; write 8/255",
        ),
        (["report", "missing", "--epsilon", "0"], 2, "write 8/255"),
        (["analyze", "missing", "--epsilon", "nan"], 2, "write 8/255"),
        (["export", "x", "--format", "web", "--epsilon", "8/0"], 2, "is no number; write 8/255"),
        (["analyze", "missing", "--epsilon", "8/255"], 3, "no run or bundle missing"),
        (["profile", "missing", "--batch", "1,x"], 2, "'1,x' is no list"),
        (["profile", "missing", "--against", "dens"], 2, "did you mean dense"),
        (["analyze", "missing"], 3, "no run or bundle missing"),
        (["analyze", "missing", "--only", "routs"], 2, "did you mean routes"),
        (["analyze", "missing", "--only", " , "], 2, "names no section"),
        (["analyze", "missing", "--smoothing", "9", "--sigma", "0"], 2, "smoothing: sigma"),
        (["analyze", "missing", "--images", "0"], 2, "images"),
        (["serve", "missing"], 3, "there is no bundle missing; name a"),
        (["serve", "missing", "--input", "x"], 2, "'advmoe predict' classifies files"),
        (["predict", "missing", "--input", "x", "--output", "y.jsonl"], 3, "no bundle missing"),
        (["serve", "missing", "--prot", "1"], 2, "(Possible options: --host, --port); see"),
        (["serve", "missing", "--no-pag"], 2, "--no-access-log, --no-page"),
        (["list", "engine"], 2, "did you mean engines"),
    ],
)
def test_an_error_is_one_line_with_its_code(
    capsys: Capture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == code
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("advmoe: error: ")
    assert message in line
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_error_under_json_is_an_object_too(capsys: Capture) -> None:
    assert run(["inspect", "missing", "--json"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["exit_code"] == 3
    assert json.loads(captured.out)["error"] in captured.err


def test_debug_shows_the_traceback_wherever_it_stands(capsys: Capture) -> None:
    for arguments in (["--debug", "inspect", "missing"], ["inspect", "missing", "--debug"]):
        assert run(arguments) == 3
        assert "Traceback" in capsys.readouterr().err


def test_list_and_doctor(capsys: Capture) -> None:
    names = answer(capsys, "list")
    assert {"recipes", "families", "models", "engines", "data"} == set(names)
    assert "digits-advmoe" in [entry["name"] for entry in names["recipes"]]
    assert list(answer(capsys, "list", "engines")) == ["engines"]
    found = answer(capsys, "doctor")
    assert found["packages"]["torch"]["extra"] == "train"
    assert found["cpus"] >= 1
    for command in (["list"], ["doctor"]):
        assert run(command) == 0
        assert "onnxruntime" in capsys.readouterr().out


def test_alone_it_explains_itself(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run([]) == 0
    out, err = capsys.readouterr()
    assert "Usage: advmoe [OPTIONS] COMMAND" in out
    assert err == ""
    assert run(["help"]) == 0
    assert capsys.readouterr().out == out
    commands = out[out.index("Commands:") : out.index("Exit codes")]
    assert "..." not in commands  # each has its whole sentence
    assert run(["help", "train"]) == 0
    assert "Usage: advmoe train" in capsys.readouterr().out
    assert run(["help", "--json", "train"]) == 0
    assert "Usage: advmoe train" in capsys.readouterr().out
    for everything in (["help", "help"], ["help", "--json"]):
        assert run(everything) == 0
        assert capsys.readouterr().out == out


def test_recipes_are_grouped_and_chosen(capsys: Capture) -> None:
    found = answer(capsys, "list", "recipes", "--data", "cifar10", "--family", "advmoe")["recipes"]
    assert {(entry["data"], entry["family"]) for entry in found} == {("cifar10", "advmoe")}
    (chosen,) = [entry for entry in found if entry["name"] == "cifar10-advmoe-cpu"]
    assert chosen["settings"] == recipe("cifar10-advmoe-cpu").model_dump(mode="json")
    everything = [(e["data"], e["family"]) for e in answer(capsys, "list", "recipes")["recipes"]]
    assert everything == [pair for pair, group in groupby(everything) for _ in group]
    assert len({*everything}) == len([*groupby(everything)])  # each group is in one piece
    assert run(["list", "recipes", "--data", "digits"]) == 0
    out = capsys.readouterr().out
    assert "recipes on digits, family vit-moe" in out
    assert "cifar10" not in out
    assert run(["list", "recipes", "--data", "cifar100", "--family", "expert-networks"]) == 0
    assert "no recipe is on this data set and of this family" in capsys.readouterr().out
    assert run(["list", "recipes", "--data", "cifar"]) == 2
    assert "did you mean cifar10" in said(capsys)
    assert run(["list", "--family", "dense"]) == 2
    assert "'advmoe list recipes'" in said(capsys)


def test_doctor_names_the_extra_of_what_is_missing(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "advmoe_deploy.cli.commands.doctor.OPTIONAL", {"x": ("no-such-package", "serve")}
    )
    assert run(["doctor"]) == 0
    assert "pip install 'advmoe-deploy[serve]'" in capsys.readouterr().out


def test_export_and_inspect(capsys: Capture, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    value = answer(capsys, "export", str(tiny_run), "--format", "onnx", "--out", str(out))
    assert value["bundle"] == str(out)
    assert value["parity"]["max_relative_logit_diff"] <= value["parity"]["logit_tolerance"]
    assert value["parity"]["images"] > 0
    assert value["parity"]["route_agreement"] == 1.0
    manifest = answer(capsys, "inspect", str(out))
    assert manifest["model"]["family"] == "advmoe"
    assert run(["inspect", str(out)]) == 0
    assert "model.onnx" in capsys.readouterr().out
    assert run(["export", str(tiny_run), "--format", "onnx", "--out", str(out)]) == 2
    assert "--overwrite" in said(capsys)


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "manifest.sha256", "golden.npz"])
def test_one_changed_byte_is_found(
    capsys: Capture, tiny_bundle: Bundle, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert run(["inspect", str(copy)]) == 3
    assert name in said(capsys)


def test_serve_refuses_the_world(capsys: Capture, tiny_bundle: Bundle) -> None:
    assert run(["serve", str(tiny_bundle.path), "--host", "0.0.0.0"]) == 2
    assert "(--token-file), use 127.0.0.1 behind a proxy" in said(capsys)
    only = ["serve", str(tiny_bundle.path), "--tls-cert", "cert.pem"]
    assert run(only) == 2
    assert "give --tls-cert and --tls-key" in said(capsys)


def test_serve_without_fastapi_names_the_extra(
    capsys: Capture, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "advmoe_deploy.serving.online.http.rest", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert run(["serve", str(tiny_bundle.path), "--port", "0"]) == 4
    assert said(capsys).endswith(
        "fastapi is not installed; run: pip install 'advmoe-deploy[serve]'"
    )


def test_positive_numbers() -> None:
    assert positive_numbers("1, 8,64", "--batch") == (1, 8, 64)
    for text in ("", "0", "-1", "1.5", "1;2"):
        with pytest.raises(UsageError, match="--batch"):
            positive_numbers(text, "--batch")

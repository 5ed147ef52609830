"""The demo leaves what it promises."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from advmoe_deploy.bundle import open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.cli.demo.photographs import ZOO_MODEL, show_photographs
from advmoe_deploy.cli.demo.result import DemoResult
from advmoe_deploy.cli.demo.screen import screen
from advmoe_deploy.progress import Silent
from advmoe_deploy.train.recipes import RECIPES
from advmoe_deploy.zoo.pack import Packing, pack_run
from tests.zoo.test_pack import results_file, seed_of


def check(out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    result: dict[str, object] = json.loads(capsys.readouterr().out)
    page = (out / "report.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 20
    assert "nan" not in page.lower().split("<svg")[0]
    assert (out / "summary.svg").read_text().startswith("<svg")
    assert json.loads((out / "result.json").read_text())["seconds"] == result["seconds"]
    lines = (out / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 101
    assert [Path(row["path"]).name for row in rows if row["error"]] == ["not-an-image.png"]
    open_bundle(out / "bundle")
    return result


def test_quick_demo_goes_the_whole_road(
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A small network stands for the model of photographs; all that is done with it is real."""
    results = results_file(tmp_path, seed=seed_of(trained_run))
    pack_run(trained_run, tmp_path / "zoo" / ZOO_MODEL, Packing(results=(results,)))
    monkeypatch.setenv("ADVMOE_ZOO", str(tmp_path / "zoo"))
    out = tmp_path / "demo [b]"
    assert run(["demo", "--quick", "--out", str(out), "--json"]) == 0
    result = check(out, capsys)
    assert result["quick"] is True
    photographs = result["photographs"]
    assert isinstance(photographs, dict)
    assert photographs["evaluation"]["robust"]["value"] == 0.9
    assert {(r["a"], r["b"]) for r in photographs["profile"]["ratios"]} >= {("dense", "moe")}
    assert 0 < photographs["served_ms"] < 10_000
    shown = screen_text(result)
    assert ZOO_MODEL in shown
    assert f"S-Dense: {RECIPES['cifar10-s-dense-cpu'].measured}" in shown
    assert "[b]" in shown  # no markup


def screen_text(result: dict[str, object]) -> str:
    """The last screen, as a terminal of 100 columns shows it."""
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(screen(DemoResult.model_validate(result)))
    return console.export_text()


def test_without_a_model_of_photographs_the_demo_begins_with_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advmoe_deploy.zoo.places.places", lambda: {"own": tmp_path})
    assert show_photographs(tmp_path / "out", quick=True, progress=Silent()) is None
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert run(["demo", "--quick", "--out", str(tmp_path)]) == 2
    assert "choose an empty --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_the_whole_demo_is_robust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--out", str(tmp_path / "demo"), "--json"]) == 0
    result = check(tmp_path / "demo", capsys)
    train, macs = result["train"], result["macs"]
    assert isinstance(train, dict)
    assert isinstance(macs, dict)
    moe, dense = train["digits-advmoe-agreeing"], train["digits-dense"]
    assert moe["effective_routes"] >= 1.5
    assert moe["clean_accuracy"] >= 0.95
    assert moe["pgd_accuracy"] >= dense["pgd_accuracy"] - 0.03
    assert macs["executed"] <= 0.36 * macs["dense"]

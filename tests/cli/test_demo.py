"""The demo leaves what it promises."""

import json
import re
from pathlib import Path

import pytest

from advmoe_deploy.bundle import open_bundle
from advmoe_deploy.cli.app import run


def check(out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    result: dict[str, object] = json.loads(capsys.readouterr().out)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert page.count("data:image/png;base64,") == 20
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "the page needs nothing else"
    assert "nan" not in page.lower().split("<svg")[0]
    assert (out / "summary.svg").read_text().startswith("<svg")
    assert json.loads((out / "result.json").read_text())["seconds"] == result["seconds"]
    lines = (out / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 101
    assert [Path(row["path"]).name for row in rows if row["error"]] == ["not-an-image.png"]
    open_bundle(out / "bundle")
    return result


def test_quick_demo_goes_the_whole_road(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert run(["demo", "--quick", "--out", str(out), "--json"]) == 0
    result = check(out, capsys)
    assert result["quick"] is True


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

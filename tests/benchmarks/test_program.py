"""What the programs share: names that are refused, rows that stay, and files that are whole."""

import json
import sys
from pathlib import Path

import pytest

from advmoe_deploy.errors import UsageError
from benchmarks.cpu import portability
from benchmarks.program import named, run_program, with_kept_rows, with_part, write
from benchmarks.training import digits


def test_a_kept_row_says_what_it_was_measured_with(tmp_path: Path) -> None:
    out, key = tmp_path / "new" / "rows.json", ("case", "batch")
    old, new = {"versions": {"numpy": "1"}, "cores": 2}, {"versions": {"numpy": "2"}, "cores": 2}
    write(out, with_kept_rows(out, old, [{"case": c, "batch": 1, "ms": 1.0} for c in "ab"], key))
    write(out, with_kept_rows(out, new, [{"case": "b", "batch": 1, "ms": 2.0}], key))
    kept = {"case": "a", "batch": 1, "ms": 1.0, "versions": {"numpy": "1"}}
    assert json.loads(out.read_text()) == {
        **new,
        "rows": [kept, {"case": "b", "batch": 1, "ms": 2.0}],
    }
    write(out, with_kept_rows(out, old, [], key))  # measured again as before
    assert [row["versions"] for row in json.loads(out.read_text())["rows"]] == [
        {"numpy": "1"},
        {"numpy": "2"},
    ]
    assert [file.name for file in out.parent.iterdir()] == ["rows.json"]


def test_names_that_are_none_are_refused() -> None:
    assert with_part("", ("advmoe-2", "ViT")) == ["advmoe-2", "ViT"]
    assert with_part("vit", ("advmoe-2", "ViT")) == ["ViT"]
    with pytest.raises(UsageError, match=r"'vti' is part of no name here; choose from advmoe-2; V"):
        with_part("advmoe,vti", ("advmoe-2", "ViT"))
    assert named("row", "paper,ours", ("ours", "paper")) == ["paper", "ours"]
    with pytest.raises(UsageError, match="unknown row 'pper'; did you mean paper"):
        named("row", "ours,pper", ("ours", "paper"))


def test_what_is_refused_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise UsageError("no; do this")

    with pytest.raises(SystemExit) as ended:
        run_program(refuse)
    assert (ended.value.code, capsys.readouterr().err) == (2, "error: no; do this\n")
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0)


@pytest.mark.parametrize("option", ["--only", "--recipes"])
def test_a_program_that_is_asked_for_nothing_measures_and_writes_nothing(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = {"--only": portability.main, "--recipes": digits.main}
    out = tmp_path / "rows.json"
    out.write_text(before := json.dumps({"rows": [{"model": "measured"}]}))
    monkeypatch.setattr(sys, "argv", ["program", option, "nosuch", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        run_program(program[option])
    assert (ended.value.code, out.read_text()) == (2, before)
    assert "nosuch" in capsys.readouterr().err

"""``advmoe predict``: what it counts, and what it could not read or write."""

import json
from pathlib import Path

import pytest
from PIL import Image

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from tests.cli.command_line import Capture, answer, said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images and a text file, all called .png."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(3):
        Image.new("L", (8, 8), 80 * index).save(folder / f"{index}.png")
    (folder / "text.png").write_text("text")
    return folder


def test_predict_counts_what_it_could_not_read(
    capsys: Capture, tiny_bundle: Bundle, folder: Path
) -> None:
    output = folder.parent / "a.jsonl"
    files = ["--input", str(folder), "--output", str(output)]
    value = answer(capsys, "predict", str(tiny_bundle.path), *files)
    assert (value["images"], value["errors"], value["output"]) == (4, 1, str(output))
    assert len(output.read_text().splitlines()) == 4
    assert run(["predict", str(tiny_bundle.path), *files, "--overwrite"]) == 0
    assert "1 unreadable" in capsys.readouterr().out
    assert run(["predict", str(tiny_bundle.path), *files, "--overwrite", "--on-error", "fail"]) == 3
    assert "1 of 4 inputs could not be read" in capsys.readouterr().err


def test_predict_fails_if_nothing_could_be_read(
    capsys: Capture, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_text("text")
    output = tmp_path / "a.jsonl"
    files = ["--input", str(tmp_path), "--output", str(output)]
    assert run(["predict", str(tiny_bundle.path), *files, "--json"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["errors"] == 1  # one object: the report, not the error
    assert "none of 1 inputs" in captured.err
    assert json.loads(output.read_text())["error"].startswith("not a PNG")


def test_targets_that_cannot_be(capsys: Capture, tiny_bundle: Bundle, folder: Path) -> None:
    start = ["predict", str(tiny_bundle.path), "--input", str(folder), "--output"]
    for target, code in (("a.txt", 2), ("0.png/a.jsonl", 3)):
        assert run([*start, str(folder / target)]) == code
        said(capsys)
    for source in ("nothing/*.png", "missing"):
        command = ["predict", str(tiny_bundle.path), "--input", str(folder / source)]
        assert run([*command, "--output", str(folder / "a.jsonl")]) == 3
        assert "no such file or folder" in said(capsys)

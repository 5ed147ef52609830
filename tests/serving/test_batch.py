"""Batch inference: a row for every input, whole or absent."""

import itertools
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import BackendUnavailableError, UsageError
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.batch import classify_files
from advmoe_deploy.serving.names import shown
from tests.cli.command_line import read_meanwhile
from tests.conftest import Notes
from tests.serving.written import rows_of


def test_every_input_has_its_row(tiny_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "answers.jsonl"
    report = classify_files(tiny_bundle, str(folder), output, batch=8)
    rows = rows_of(output)
    assert (report.images, report.errors, report.resumed) == (22, 2, 0)
    assert [row["path"] for row in rows] == sorted(str(p) for p in folder.iterdir())
    assert [Path(row["path"]).name for row in rows if row["error"]] == ["05b.png", "zz.png"]
    assert rows[6]["error"].startswith("not a PNG")
    assert list(output.parent.iterdir()) == [output]  # nothing else is left behind


def test_rows_say_what_the_runner_says(tiny_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    classify_files(tiny_bundle, str(folder), tmp_path / "a.jsonl", batch=4, top_k=3)
    good = [row for row in rows_of(tmp_path / "a.jsonl") if row["error"] is None]
    with open_runner(tiny_bundle) as runner:
        prediction = runner.infer(to_float(load_dataset("digits").test.images[:20]))
    powers = np.exp(prediction.logits - prediction.logits.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    for row, one, ids in zip(good, probabilities, prediction.expert_ids["router"], strict=True):
        assert row["label_id"] == one.argmax()
        assert row["label"] == tiny_bundle.manifest.class_names[row["label_id"]]
        assert row["probability"] == pytest.approx(one.max(), abs=2e-6)
        assert row["expert_ids"] == {"router": ids.tolist()}
        best = [entry["probability"] for entry in row["top_k"]]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
        assert row["top_k"][0]["label"] == row["label"]


def test_parquet_holds_the_same_rows(tiny_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    for suffix in ("jsonl", "parquet"):
        classify_files(tiny_bundle, str(folder), tmp_path / f"a.{suffix}", top_k=2)
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist() == rows_of(tmp_path / "a.jsonl")


def test_other_sizes_are_said_once(tiny_bundle: Bundle, tmp_path: Path) -> None:
    for index in range(5):
        Image.new("L", (16, 12), 40 * index).save(tmp_path / f"{index}.png")
    notes = Notes()
    classify_files(tiny_bundle, str(tmp_path), tmp_path / "a.jsonl", batch=2, progress=notes)
    assert [note for note in notes.notes if "16 x 12" in note] == notes.notes
    assert len(notes.notes) == 1


def test_a_name_that_is_no_utf8_still_has_a_row(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with open(os.fsencode(tmp_path / "in") + b"/\xff.png", "wb") as file:  # noqa: PTH123
        Image.new("L", (8, 8)).save(file, "PNG")
    for suffix in ("jsonl", "parquet"):
        report = classify_files(tiny_bundle, str(tmp_path / "in"), tmp_path / f"a.{suffix}")
        assert (report.images, report.errors) == (1, 0)


def test_names_of_any_bytes_are_told_apart(tiny_bundle: Bundle, tmp_path: Path) -> None:
    names = [b"\xff.png", b"\xfe.png", b"\xff\\xff.png", b"a\\b.png", b'new\nline "q".png', "ж.png"]
    names.append(b"\\xff.png")  # which is UTF-8, and looks like the first
    (tmp_path / "in").mkdir()
    for name in map(os.fsdecode, names):
        Image.new("L", (8, 8)).save(tmp_path / "in" / name, "PNG")
    for suffix in ("jsonl", "parquet"):
        classify_files(tiny_bundle, str(tmp_path / "in"), tmp_path / f"a.{suffix}")
    rows = rows_of(tmp_path / "a.jsonl")
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist() == rows
    assert sorted(Path(row["path"]).name for row in rows) == sorted(
        [
            "\\xff.png",
            "\\xfe.png",
            "\\xff\\\\xff.png",
            "a\\b.png",
            'new\nline "q".png',
            "ж.png",
            "\\\\xff.png",
        ]
    )


def test_no_two_names_are_shown_alike() -> None:
    pieces = [b"\\", b"x", b"2", b"3", b"#", b"\xff", b"f"]
    names = {b"".join(some) for n in range(1, 6) for some in itertools.product(pieces, repeat=n)}
    found = {shown(os.fsdecode(name)) for name in names}
    assert len(found) == len(names)
    assert not any(re.search(r"#[0-9]+\Z", name) for name in found)
    assert shown("a.png") == "a.png"
    assert shown("a\\b#1.png") == "a\\b#1.png"


def test_what_was_planted_beside_the_output_is_not_followed(
    tiny_bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    for suffix in ("jsonl", "parquet"):
        output = tmp_path / f"a.{suffix}"
        partial = tmp_path / f".a.{suffix}.partial-{platform.node()}-{int(dead.stdout)}-0"
        partial.symlink_to(precious)
        classify_files(tiny_bundle, str(folder), output)
        assert not os.path.lexists(partial)
        assert output.is_file()
        journal = tmp_path / f".b.{suffix}.partial.jsonl"
        for plant in (journal.symlink_to, journal.hardlink_to):
            for options in ({}, {"overwrite": True}, {"resume": True}):
                journal.unlink(missing_ok=True)
                plant(precious)
                with pytest.raises(UsageError, match=r"remove it|--resume"):
                    classify_files(tiny_bundle, str(folder), tmp_path / f"b.{suffix}", **options)
        journal.unlink()
        journal.symlink_to(tmp_path / "nowhere")
        with pytest.raises(UsageError, match="is a link, where a journal is to be; remove it"):
            classify_files(tiny_bundle, str(folder), tmp_path / f"b.{suffix}")
        journal.unlink()
        os.mkfifo(journal)
        with pytest.raises(UsageError, match="no file of its own"):
            classify_files(tiny_bundle, str(folder), tmp_path / f"b.{suffix}", overwrite=True)
    assert precious.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


def test_what_has_no_answer_is_a_row_or_counted(
    tiny_bundle: Bundle, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "album").symlink_to(folder)
    (tmp_path / "in" / "gone").symlink_to("nowhere")
    for name in (".hidden.png", "notes.txt", "[bold]\n.csv"):
        (tmp_path / "in" / name).touch()
    output = str(tmp_path / "a.jsonl")
    command = [
        "predict",
        str(tiny_bundle.path),
        "--input",
        str(tmp_path / "in"),
        "--output",
        output,
    ]
    assert run([*command, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["images"], report["errors"]) == (23, 3)
    assert [(one["reason"], one["count"]) for one in report["skipped"]] == [
        ("hidden", 1),
        ("not an image by its suffix", 2),
    ]
    assert report["skipped"][0]["examples"] == [str(tmp_path / "in" / ".hidden.png")]
    assert rows_of(tmp_path / "a.jsonl")[-1]["error"] == "a link to 'nowhere', where nothing is"
    assert run([*command, "--overwrite"]) == 0
    text = capfd.readouterr().out.replace("\n", "")
    assert "note: 1 skipped, hidden: '" in text
    assert "[bold]\\n.csv'" in text


def test_an_existing_output_is_refused(tiny_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    output.write_text("precious")
    for resume in (False, True):
        with pytest.raises(UsageError, match="--overwrite"):
            classify_files(tiny_bundle, str(folder), output, resume=resume)
    assert output.read_text() == "precious"
    classify_files(tiny_bundle, str(folder), output, overwrite=True)
    assert len(rows_of(output)) == 22
    (below := tmp_path / "b.jsonl").mkdir()
    with pytest.raises(UsageError, match="is a directory"):  # before anything is classified
        classify_files(tiny_bundle, str(folder), below, overwrite=True)
    assert not any(path.name.startswith(".b.jsonl") for path in tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_pipe_is_written_through_and_a_link_followed(
    suffix: str, tiny_bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    pipe, link, output = (tmp_path / f"{name}.{suffix}" for name in ("pipe", "link", "output"))
    os.mkfifo(pipe)
    link.symlink_to(output)
    classify_files(tiny_bundle, str(folder), link)
    with read_meanwhile(pipe) as read:
        classify_files(tiny_bundle, str(folder), pipe, overwrite=True)
    assert read() == output.read_bytes()
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {pipe.name, link.name, output.name}


def test_nonsense_is_refused(tiny_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none of \.jsonl, \.parquet and \.csv"):
        classify_files(tiny_bundle, str(folder), tmp_path / "a.txt")
    with pytest.raises(UsageError, match=r"outside 0\.\.10"):
        classify_files(tiny_bundle, str(folder), tmp_path / "a.jsonl", top_k=11)
    with pytest.raises(UsageError, match="batch=0"):
        classify_files(tiny_bundle, str(folder), tmp_path / "a.jsonl", batch=0)


def test_parquet_without_pyarrow_names_the_extra(
    tiny_bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BackendUnavailableError, match=r"advmoe-deploy\[serve\]"):
        classify_files(tiny_bundle, str(folder), tmp_path / "a.parquet")

"""The comparison of our attacks with others' code: both sides agree, and rows are merged."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.training import pyautoattack_agreement as agreement
from benchmarks.training.pyautoattack_agreement import (
    SIDES,
    Side,
    main,
    row_of,
    side_of,
    stands,
    subject_of,
)


def compare(run: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict]:
    threads = str(torch.get_num_threads())
    given = ["agreement", "--run", str(run), "--out", str(out), "--threads", threads]
    monkeypatch.setattr(sys, "argv", [*given, "--images", "24", "--iterations", "4", *options])
    main()
    return json.loads(out.read_text())["rows"]


def test_both_sides_agree_to_the_image(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.json"
    rows = compare(trained_run, out, monkeypatch, "--attacks", "square,pgd,apgd", "--queries", "30")
    assert [row["attack"] for row in rows] == ["pgd", "apgd", "square"]
    for row in rows:
        assert (row["n"], row["ours"]["n"], row["difference_points"]) == (24, 24, 0.0)
        assert row["only_ours_breaks"] == row["only_theirs_breaks"] == 0
        assert row["theirs"]["share"] <= row["clean"]["share"]
        assert {"pyautoattack", "torch"} <= row["versions"].keys()
    again = compare(trained_run, out, monkeypatch, "--attacks", "apgd", "--seed", "1")
    assert [(row["attack"], row["seed"]) for row in again] == [
        ("pgd", 0),
        ("apgd", 1),
        ("square", 0),
    ]


def test_autoattack_goes_the_same_way(trained_run: Path) -> None:
    subject, _ = subject_of(trained_run, None, 4)
    wide = subject._replace(epsilon=0.5)  # so that its first attack succeeds and the test is short
    sides = {side: side_of(side, "autoattack", wide, steps=100, seed=0) for side in SIDES}
    row = row_of("autoattack", sides, steps=100, seed=0)
    assert row["ours"]["share"] == row["theirs"]["share"] == 0
    assert row["steps"] is None


def test_sides_that_ran_apart_make_the_row(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, given = tmp_path / "rows.json", ("--attacks", "apgd", "--keep", str(tmp_path / "sides"))
    with pytest.raises(SystemExit):
        compare(trained_run, out, monkeypatch, "--side", "ours")
    with pytest.raises(FileNotFoundError):  # no row yet
        compare(trained_run, out, monkeypatch, *given, "--side", "theirs")
    (apart,) = compare(trained_run, out, monkeypatch, *given, "--side", "ours")
    out.unlink()
    (together,) = compare(trained_run, out, monkeypatch, "--attacks", "apgd")
    assert {**apart, "seconds": 0} == {**together, "seconds": 0}


def test_whoever_ends_last_makes_the_row(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, given = tmp_path / "rows.json", ("--attacks", "apgd", "--keep", str(tmp_path / "sides"))

    def meanwhile(side: str, *how: Any, **more: Any) -> Side:
        monkeypatch.setattr(agreement, "side_of", side_of)
        with pytest.raises(FileNotFoundError):  # the other process ends first, and finds one side
            compare(trained_run, out, monkeypatch, *given, "--side", "ours")
        return side_of(side, *how, **more)

    monkeypatch.setattr(agreement, "side_of", meanwhile)
    (row,) = compare(trained_run, out, monkeypatch, *given, "--side", "theirs")
    assert row["difference_points"] == 0


def test_what_leaves_the_ball_is_no_example(trained_run: Path) -> None:
    subject, about = subject_of(trained_run, None, 3)
    assert stands(subject, subject.images).sum() <= about["n"] == 3
    with pytest.raises(ValueError, match=r"beyond 0\.05"):
        stands(subject, (subject.images + 0.06).clamp(max=1))


def test_unknown_attacks_are_refused(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        compare(trained_run, tmp_path / "rows.json", monkeypatch, "--attacks", "pgd,fgsm")

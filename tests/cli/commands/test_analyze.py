"""``advmoe analyze`` leaves a report of whatever it is given, whole or not at all."""

import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from advmoe_deploy.analysis import smoothing
from advmoe_deploy.analysis.smoothing import CertifiedImage
from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.cli.grid import Grid
from advmoe_deploy.cli.pages import analysis_report
from tests.cli.command_line import Capture, said
from tests.conftest import TINY, write_run
from tests.families import spec_of

QUICK = ("--images", "24", "--steps", "2")
PLOTS = {
    "attack-on-answer", "attack-on-routes", "attack-targets", "disagreement", "expert-by-class",
    "expert-load", "fixed-experts", "route-margins",
}  # fmt: skip


def analysed(capsys: Capture, *arguments: object) -> Any:
    assert run(["analyze", *map(str, arguments), *QUICK, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_run_gets_a_report_of_its_own(capsys: Capture, tiny_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    value = analysed(capsys, copy, "--smoothing", 50)
    out = copy / "analysis"
    assert value["out"] == str(out)
    assert value["images"] == 24
    assert value["threat"]["epsilon"] == 0.1
    assert sum(value["routes"][0]["load"]) == 24
    assert value["smoothing"]["settings"]["n"] == 50
    kept = json.loads((out / "analysis.json").read_text())
    assert kept == {key: item for key, item in value.items() if key != "out"}
    assert {path.stem for path in out.glob("*.png")} == {*PLOTS, "smoothing"}
    page = (out / "report.html").read_text()
    assert page.count("<svg") == len(PLOTS) + 1
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "the page needs nothing else"
    assert run(["analyze", str(copy)]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    again = analysed(capsys, copy, "--only", "routes,certificate", "--overwrite")
    assert again["experts"] is again["smoothing"] is again["lipschitz"] is None
    assert again["routes"] == value["routes"]
    assert again["certificate"] == value["certificate"]
    assert sorted(path.name for path in copy.iterdir()) == ["analysis", "model"]


def test_a_bundle_is_analysed_by_its_weights_and_stays_whole(
    capsys: Capture, tiny_run: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    value = analysed(capsys, copy, "--only", "routes,changes")
    assert value["out"] == str(tmp_path / "bundle-analysis")
    same = analysed(capsys, tiny_run, "--only", "routes,changes", "--out", tmp_path / "other")
    assert value["routes"] == same["routes"]
    assert value["changes"] == same["changes"]
    open_bundle(copy)


def test_a_dense_model_gets_what_is_possible(capsys: Capture, tmp_path: Path) -> None:
    dense = write_run(tmp_path / "dense", TINY.s_dense())
    assert run(["analyze", str(dense), *QUICK]) == 0
    out = capsys.readouterr().out
    assert "a dense model routes nothing: analysed are lipschitz, certificate, smoothing" in out
    assert "the network" in out
    assert {p.suffix for p in (dense / "analysis").iterdir()} == {".json", ".html"}
    assert run(["analyze", str(dense), "--only", "experts", "--overwrite"]) == 2
    assert "experts needs a router" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["conv experts", "token experts"])
def test_many_layers_fit_on_the_screen_and_the_page(
    capsys: Capture, tmp_path: Path, family: str
) -> None:
    path = write_run(tmp_path / family, spec_of(family))
    assert run(["analyze", str(path), *QUICK]) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 120
    assert "all layers" in out
    assert {p.stem for p in (path / "analysis").glob("*.png")} == PLOTS


def test_a_section_that_crashes_takes_no_other_with_it(
    capsys: Capture, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("advmoe_deploy.analysis.analyze.certificate", crash)
    command = ["analyze", str(tiny_run), "--only", "routes,certificate", *QUICK]
    assert run([*command, "--out", str(tmp_path / "out"), "--json"]) == 70
    (kept,) = json.loads(capsys.readouterr().out)["measured"]
    assert sum(kept["routes"][0]["load"]) == 24
    assert kept["certificate"] is None
    assert run([*command, "--out", str(tmp_path / "out")]) == 70
    assert "effective routes" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("1/255..4/255", (1, 2, 3, 4)),
        ("0.5/255..0.7/255,4/255", (0.5, 0.6, 0.7, 4)),
        ("4/255,4/255", (4,)),
    ],
)
def test_radii_are_a_list_or_a_range(text: str, levels: tuple[float, ...]) -> None:
    radii = Grid.of(text, None, None, ("radii",), None).radii
    assert radii == pytest.approx([level / 255 for level in levels])
    assert Grid.of("0.01..0.03", None, None, ("radii",), None).radii == (0.01, 0.02, 0.03)


def test_bad_inputs_leave_nothing(capsys: Capture, tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for arguments, code, words in (
        ([tmp_path / "empty"], 3, "neither a finished run nor a bundle"),
        ([tiny_run, "--epsilon", "2"], 2, "outside (0, 1]"),
        ([tiny_run, "--radii", "1/255..2/510"], 2, "'1/255..2/510' is no range"),
        ([tiny_run, "--sigma", "0.5"], 2, "give --smoothing 1000 too"),
        ([tiny_run, tiny_run], 2, "--dissect and --alpha take several runs"),
        ([tiny_run, "--data", "digit"], 2, "did you mean digits"),
        ([tiny_run, "--data", "folder:/x?size=16"], 3, "/x"),
    ):
        assert run(["analyze", *map(str, arguments), "--out", str(out)]) == code
        line = said(capsys)
        assert words in line
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert run(["analyze", str(tiny_run), "--out", str(out), "--overwrite"]) == 2
    assert "holds no analysis.json" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("seed", [(1 << 64) - 1, 1 << 64])
def test_every_seed_of_torch_is_taken(
    seed: int, capsys: Capture, tiny_run: Path, tmp_path: Path
) -> None:
    words = [
        "--only",
        "smoothing",
        "--smoothing",
        "10",
        "--images",
        "1",
        "--out",
        str(tmp_path / "o"),
    ]
    code = run(["analyze", str(tiny_run), *words, "--seed", str(seed)])
    assert code == (2 if seed >> 64 else 0), capsys.readouterr().err


def test_a_page_that_cannot_be_written_takes_no_figures_with_it(
    capsys: Capture, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "analysis.html")

    monkeypatch.setattr(analysis_report, "write_report", full)
    out = tmp_path / "out"
    assert run(["analyze", str(tiny_run), "--only", "lipschitz", "--json", "--out", str(out)]) == 5
    shown = json.loads(capsys.readouterr().out)
    assert shown["measured"][0]["lipschitz"]
    assert not out.exists()


def test_without_matplotlib_it_says_so_before_the_work(
    capsys: Capture, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["analyze", str(tiny_run), "--out", str(tmp_path / "out")]) == 4
    captured = capsys.readouterr()
    assert captured.err.endswith("run: pip install 'advmoe-deploy[report]'\n")
    assert list(tmp_path.iterdir()) == []


def test_smoothing_that_was_interrupted_goes_on(
    capsys: Capture, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (tiny_run, "--only", "smoothing", "--smoothing", 40)
    whole = analysed(capsys, *arguments, "--out", tmp_path / "whole")
    certify_one, seen = smoothing._certified, []

    def interrupted(*details: Any) -> CertifiedImage:
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(details[3])
        return certify_one(*details)

    out = tmp_path / "cut"
    monkeypatch.setattr(smoothing, "_certified", interrupted)
    assert run(["analyze", *map(str, arguments), *QUICK, "--out", str(out)]) == 130
    assert [p.name for p in tmp_path.iterdir() if p.name != "whole"] == [".cut.smoothing.jsonl"]
    monkeypatch.setattr(smoothing, "_certified", certify_one)
    capsys.readouterr()
    again = analysed(capsys, *arguments, "--out", out)
    assert again["smoothing"] == whole["smoothing"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]

"""The page that ``advmoe profile --html`` writes."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.cli.pages.profile_report import write_profile_report
from advmoe_deploy.profiling.profile import profile_bundle
from advmoe_deploy.reports import LatencyReport
from tests.cli.command_line import read_meanwhile


def test_the_page_shows_every_figure_of_the_report(tiny_bundle: Bundle, tmp_path: Path) -> None:
    engines = ("onnxruntime", "onnxruntime-plan")
    report = profile_bundle(tiny_bundle, engines=engines, batches=(1, 4), n=3, warmup=1)
    write_profile_report(report, tiny_bundle, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for row in report.rows:
        assert f"{row.p50_ms:.3f}" in page
        assert f"{row.p50_ms:.3g} ms" in page
    assert {f"{ratio.ratio:.2f}x" for ratio in report.ratios} <= set(re.findall(r"[\d.]+x", page))
    assert page.count("<svg") == 1
    assert "moe, onnxruntime-plan fp32" in page


def test_one_batch_size_makes_no_line(tiny_bundle: Bundle, tmp_path: Path) -> None:
    report = profile_bundle(tiny_bundle, batches=(2,), against=(), n=2, warmup=1)
    write_profile_report(report, tiny_bundle, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<svg") == 0


def test_the_command_writes_the_page(tiny_bundle: Bundle, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = ["profile", str(tiny_bundle.path), "--batch", "1", "--html", str(page), "--json"]
    assert run(command) == 0
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_without_what_draws_it_says_so_before_the_work(
    library: str,
    capsys: pytest.CaptureFixture[str],
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    page = tmp_path / "page.html"
    assert run(["profile", str(tiny_bundle.path), "--html", str(page)]) == 4
    assert capsys.readouterr().err.endswith("run: pip install 'advmoe-deploy[report]'\n")
    assert not page.exists()


def test_a_page_that_cannot_be_written_takes_no_figure_with_it(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_bundle: Bundle,
    tmp_path: Path,
) -> None:
    page = tmp_path / "file" / "page.html"
    page.parent.mkdir()

    def profiled_meanwhile(*args: Any, **options: Any) -> LatencyReport:
        page.parent.rmdir()
        page.parent.write_text("mine")
        return profile_bundle(*args, **options)

    command = ["profile", str(tiny_bundle.path), "--batch", "1", "--against", "", "--json"]
    with monkeypatch.context() as changed:
        changed.setattr("advmoe_deploy.profiling.profile.profile_bundle", profiled_meanwhile)
        assert run([*command, "--html", str(page)]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"][0]["batch"] == 1
    assert captured.err.splitlines()[-1].startswith("advmoe: error: ")
    assert page.parent.read_text() == "mine"
    assert run([*command, "--html", str(page)]) == 3  # now it has no place from the start
    assert "rows" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("option", ["--out", "--html"])
def test_a_directory_is_refused_before_the_work(
    option: str, capsys: pytest.CaptureFixture[str], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    assert run(["profile", str(tiny_bundle.path), option, str(tmp_path)]) == 2
    assert f"{option}: {tmp_path} is a directory; name a file in it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_written_through_and_a_link_followed(tiny_bundle: Bundle, tmp_path: Path) -> None:
    pipe, link, page = tmp_path / "pipe", tmp_path / "link.html", tmp_path / "page.html"
    os.mkfifo(pipe)
    link.symlink_to(page)
    command = ["profile", str(tiny_bundle.path), "--batch", "1", "--against", ""]
    with read_meanwhile(pipe) as read:
        assert run([*command, "--out", str(pipe), "--html", str(link)]) == 0
    assert json.loads(read())["rows"][0]["batch"] == 1
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")

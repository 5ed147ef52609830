"""Screens of a terminal of 80 columns and 24 lines, in tmux: what a person sees, while and after.

Whatever the machine's pace: a screen is looked at again and again until the command has ended.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from advmoe_deploy.bundle import Bundle

if shutil.which("tmux") is None:
    pytest.skip("tmux is not installed", allow_module_level=True)

COLUMNS, LINES = 80, 24
LONGEST_S = 240
# A bar, a count, the time gone and the time left, on one line.
BAR = re.compile(r"^\S.* ?━+.* +\d+/\d+ \d+:\d\d eta (-:--|[\d:]+)$")
TINY = [
    *("digits-advmoe-agreeing", "--threads", "1"),
    *(
        f"--set={setting}"
        for setting in ("epochs=1", "model.width=8", "train_images=200", "test_images=20")
    ),
]


def screens(tmp_path: Path, *arguments: str) -> Iterator[str]:
    """Yield each screen that the command shows, the last one as it has ended well."""
    server, ended = f"advmoe-{uuid.uuid4().hex}", "ended with"
    command = shlex.join([sys.executable, "-m", "advmoe_deploy.cli.app", *arguments])
    # The status is in another form than in the command, which the shell may echo.
    program = f"{command}; echo {ended} $?; sleep {LONGEST_S}"

    def tmux(*line: str) -> str:
        done = subprocess.run(
            ["tmux", "-L", server, "-f", "/dev/null", *line],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=30,
            check=True,
        )
        return done.stdout

    tmux("new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES), "sh", "-c", program)
    try:
        deadline, shown = time.monotonic() + LONGEST_S, ""
        while f"{ended} " not in shown:
            assert time.monotonic() < deadline, shown
            time.sleep(0.05)
            # Without -J, lines are as the terminal has wrapped them.
            seen = tmux("capture-pane", "-p").rstrip()
            if seen != shown:
                shown = seen
                yield seen
        whole = tmux("capture-pane", "-p", "-S", "-500")
        assert f"{ended} 0" in whole, whole
        yield whole
    finally:
        tmux("kill-server")


def assert_whole(seen: list[str]) -> str:
    """Check that nothing was cut or wrapped and that bars are legible; return the last screen."""
    running = [line for screen in seen for line in screen.splitlines() if " eta" in line]
    assert running, seen
    for line in running:
        assert BAR.search(line), line
    assert "…" not in "".join(seen)
    return seen[-1]


def cells(screen: str, first: str) -> list[str]:
    """Return the cells of the one line that begins with ``first``."""
    (line,) = [each for each in screen.splitlines() if each.strip().startswith(first)]
    return line.split()


def test_profile(tiny_bundle: Bundle, tmp_path: Path) -> None:
    engines = ["--engine", "onnxruntime-plan", "--engine", "onnxruntime", "--against", "dense"]
    seen = [*screens(tmp_path, "profile", str(tiny_bundle.path), "--batch", "1,2", *engines)]
    last = assert_whole(seen)
    assert len(re.findall(r"^moe +onnxruntime-plan fp32 +[12] ", last, re.M)) == 2
    assert "for want of width without n" in last
    # Too long for a line, it folds between words.
    assert re.search(r"^MoE on onnxruntime(-plan)? fp32 \d+\.\d\dx as fast as ", last, re.M)


@pytest.mark.slow
def test_verify(tiny_bundle: Bundle, tmp_path: Path) -> None:
    options = ["--images", "400", "--allow-fragile"]
    seen = [*screens(tmp_path, "verify", str(tiny_bundle.path), *options)]
    last = assert_whole(seen)
    assert any(re.search(r"^verify .*\n(pgd|square)-\d+.* eta ", s, re.M) for s in seen)
    # Six figures behind the whole name.
    assert cells(last, "pgd-20 pathway margin")[3] == "reference"
    assert cells(last, "square-200")[1] == "engine"
    assert "engine: onnxruntime fp32" in last


@pytest.mark.slow
def test_benchmark(tiny_bundle: Bundle, tmp_path: Path) -> None:
    arguments = ["--images", "50", "--batch", "1,8,64"]
    last = assert_whole([*screens(tmp_path, "benchmark", str(tiny_bundle.path), *arguments)])
    for engine in ("onnxruntime:fp32", "openvino:fp32", "dense network"):
        assert re.search(rf"^[* ] {engine} +\d", last, re.M) or engine == "dense network"
    assert re.search(r"^engine .*clean % .*ms at 1 .*ms at 64", last, re.M)


@pytest.mark.slow
def test_train(tmp_path: Path) -> None:
    seen = [*screens(tmp_path, "train", *TINY, "--out", "run")]
    last = assert_whole(seen)
    assert any(re.search(r"^train .* eta .*\n  loss \d", screen, re.M) for screen in seen)
    assert any(re.search(r"^test .* eta ", screen, re.M) for screen in seen)
    assert re.search(r"^  loss .*clean accuracy [\d.]+ %  PGD accuracy [\d.]+ %", last, re.M)


@pytest.mark.slow
def test_sweep(tmp_path: Path) -> None:
    over = ["--over", "model.num_experts=2,3", "--out", "sweep"]
    seen = [*screens(tmp_path, "sweep", *TINY, *over)]
    last = assert_whole(seen)
    assert any(re.search(r"^sweep .* eta .*\ntrain .* eta ", screen, re.M) for screen in seen)
    assert re.search(r"^model\.num_experts +robust +clean", last, re.M)

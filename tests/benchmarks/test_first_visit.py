"""Scripts of a first visit to a GPU, as far as a CPU runs them."""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu.main import stages
from benchmarks.gpu.visit import cuda_layer, host_cuda
from benchmarks.gpu.visit.prepare import CALL_BYTES, PIECE_BYTES, write_pieces, write_stand_in

ROOT = Path(__file__).parents[2]
VISIT = ROOT / "benchmarks" / "gpu" / "visit"
CALLS = sorted(VISIT.glob("call_*.sh"))


def run(script: str, folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a script as a call of its own, dry, with its results in a new folder."""
    out = folder / f"out-{len(list(folder.glob('out-*')))}"
    variables = {"OUT": out, "VISIT": folder / "visit", "PACK": folder / "pack", "DRY": "1"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", str(VISIT / script), *words],
        env={**os.environ, **{k: str(v) for k, v in variables.items()}, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_our_cuda_layer_holds_over_the_stand_in_and_failures_are_written(tmp_path: Path) -> None:
    out = tmp_path / "cuda.json"
    with host_cuda.installed():
        assert cuda_layer.measure(out)
    assert json.loads(out.read_text()).keys() == {part.__name__ for part in cuda_layer.PARTS}
    with host_cuda.installed() as host:
        host.failing["cudaGraphInstantiate"] = host_cuda.cudaError_t.cudaErrorInvalidValue
        assert not cuda_layer.measure(out)
    found = json.loads(out.read_text())
    assert "cudaErrorInvalidValue" in found["capture"]["failed"]
    assert found["times"]["holds"]  # what comes after it is measured all the same


@pytest.mark.skipif(shutil.which("xz") is None, reason="no xz")
def test_pieces_come_in_any_order_and_damaged_ones_come_again(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    (whole / "site").mkdir(parents=True)
    random = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8)
    random.tofile(whole / "site" / "library")
    pieces = write_pieces(whole, tmp_path / "all", size=100_000)
    assert [piece.name for piece in pieces] == ["piece.00", "piece.01", "piece.02", "piece.03"]
    pack = tmp_path / "pack" / "tensorrt"
    pack.mkdir(parents=True)
    shutil.copy(tmp_path / "all" / "pieces.sha256", pack)

    def call(*brought: Path, damaged: Path | None = None) -> str:
        for piece in brought:
            shutil.copy(piece, pack)
        if damaged:
            (pack / damaged.name).write_bytes(b"cut off")
        said = run("call_2_pieces.sh", tmp_path, "tensorrt").stdout
        for piece in pack.glob("piece.*"):
            piece.unlink()
        return said

    assert "tensorrt: 2 of 4 pieces" in call(*pieces[2:])
    assert "tensorrt: 3 of 4 pieces" in call(pieces[0], damaged=pieces[1])
    visit = tmp_path / "visit"
    os.killpg(int((visit / "tensorrt.pid").read_text()), signal.SIGKILL)  # ended with its call
    assert not (visit / "tensorrt.done").exists()
    assert "tensorrt: 4 of 4 pieces" in call(pieces[1])
    unpacked = visit / "tensorrt" / "whole" / "site" / "library"
    np.testing.assert_array_equal(np.fromfile(unpacked, np.uint8), random)


def test_a_stand_in_answers_with_an_error_for_what_is_wanted_of_a_library(tmp_path: Path) -> None:
    def compiled(name: str, source: str, *options: str) -> Path:
        target = tmp_path / name
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-xc", "-", "-o", str(target)]
        words = [*command, "-xnone", *options, f"-Wl,-rpath,{tmp_path}"]
        subprocess.run(words, input=source, text=True, check=True, timeout=60)
        return target

    script = tmp_path / "versions"  # symbols have the library's name as their version
    script.write_text("libwhole.so.8 { global: *; };")
    source = "int create(void) { return 0; } int unused(void) { return 0; }"
    whole = compiled("libwhole.so.8", source, f"-Wl,--version-script,{script}")
    user = compiled(
        "libuser.so.8", "int create(void); int use(void) { return create(); }", str(whole)
    )
    whole.unlink()
    write_stand_in(tmp_path, "libwhole.so.8", "libuser.so.8")
    assert ctypes.CDLL(str(user)).use() == 1
    assert not hasattr(ctypes.CDLL(str(whole)), "unused")


def test_steps_are_cut_off_and_what_follows_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "call.sh"
    script.write_text(
        f". {VISIT}/steps.sh\n"
        "step fails 20 false\n"
        "step hangs 6 sleep 60\n"
        "mkdir -p $VISIT/work/stages && echo measured > $VISIT/work/stages/s.json\n"
        "step works 20 echo fine\n"
        "echo $(($(date +%s) - 838)) > $VISIT/began\n"
        "step late 20 echo never\n"
    )
    done = run(str(script), tmp_path, DRY="")
    assert "never" not in done.stdout
    out = tmp_path / "out-0"
    rows = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert [(row["step"], row["rc"]) for row in rows] == [
        ("fails", "1"),
        ("hangs", "124"),
        ("works", "0"),
        ("late", "skipped"),
    ]
    assert rows[1]["cut_off_s"] == 6
    with tarfile.open(out / "kept.tgz") as kept:  # one file, for few come back
        measured = kept.extractfile("work/stages/s.json")
        assert measured is not None
        assert measured.read() == b"measured\n"
    assert len(list(out.iterdir())) == 2


def test_a_piece_fits_a_call_beside_this_checkout() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    checkout = sum(file.stat().st_size for file in files if file.is_file())
    assert checkout + PIECE_BYTES <= CALL_BYTES


@pytest.mark.parametrize("script", CALLS, ids=lambda script: script.name)
def test_every_call_is_in_the_plan_and_within_its_time(script: Path) -> None:
    plan = (ROOT / "benchmarks" / "gpu" / "first_visit.md").read_text()
    assert f"`{script.name}" in plan
    code = script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    limits = [int(seconds) for seconds in re.findall(r"^ *step \w+ (\d+) ", code, re.MULTILINE)]
    assert sum(limits) <= 585
    assert f"({sum(limits)}" in plan or len(limits) < 2


def test_what_is_packed_is_no_part_of_the_checkout() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    command = ["git", "check-ignore", "pack/1", "pack/tensorrt/piece.00"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_the_stages_of_a_call_exist() -> None:
    known = stages()
    for script in CALLS:
        for names in re.findall(r"--stages (\S+)", script.read_text()):
            assert set(names.split(",")) <= set(known)

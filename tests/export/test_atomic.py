"""A bundle is there or it is not, whatever happens meanwhile."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from advmoe_deploy.bundle import open_bundle
from advmoe_deploy.errors import (
    UsageError,
    machine_error,
)
from advmoe_deploy.export.from_run import export_run
from tests.conftest import assert_nothing_left


def test_an_existing_target_is_left_alone(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"holds no manifest\.json, so it is not replaced"):
            export_run(tiny_run, tmp_path / "bundle", overwrite=overwrite)
    assert (tmp_path / "bundle" / "mine.txt").read_text() == "mine"


def test_only_a_bundle_is_replaced(tiny_run: Path, tmp_path: Path) -> None:
    export_run(tiny_run, tmp_path / "bundle", data="random:8")
    with pytest.raises(UsageError, match="exists; pass --overwrite"):
        export_run(tiny_run, tmp_path / "bundle")
    (tmp_path / "link").symlink_to("bundle")
    export_run(tiny_run, tmp_path / "link", data="random:9", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert open_bundle(tmp_path / "bundle").manifest.parity.data == "random:9"


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_the_current_directory_is_no_target(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "manifest.json").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="holds the current directory"):
        export_run(tiny_run, Path(out), overwrite=True)
    assert os.listdir(tmp_path) == ["manifest.json"]


EXPORT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.progress import Silent

class Talker(Silent):
    def advance(self, task, steps=1, **figures):
        print("advanced", file=sys.stderr, flush=True)

{before}
export_run(Path({run!r}), Path({out!r}), data="random:8", progress={progress})
"""


def export_program(run: Path, out: Path, *, before: str = "", progress: str = "None") -> list[str]:
    program = EXPORT.format(run=str(run), out=str(out), before=before, progress=progress)
    return [sys.executable, "-c", program]


def test_export_is_quiet(tiny_run: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        export_program(tiny_run, tmp_path / "bundle"), capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_ctrl_c_leaves_nothing(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    command = export_program(tiny_run, out, progress="Talker()")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "advanced\n"
        assert list(tmp_path.glob(".bundle.partial-*"))
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.stderr.read()
    assert process.returncode != 0
    assert_nothing_left(out)


def test_a_file_size_limit_leaves_nothing(tiny_run: Path, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    done = subprocess.run(
        export_program(tiny_run, tmp_path / "bundle", before=limit),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "OSError: [Errno 27]" in done.stderr
    assert_nothing_left(tmp_path / "bundle")


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A disk of 256 KiB, where this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_nothing(tiny_run: Path, small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        export_run(tiny_run, small_disk / "bundle", data="random:8")
    error = machine_error(caught.value)
    assert error is not None
    assert error.exit_code == 5
    assert_nothing_left(small_disk / "bundle")
    assert not os.listdir(small_disk)

"""Files are whole or absent."""

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from advmoe_deploy.errors import InputError, MachineError, UsageError
from advmoe_deploy.files import (
    refuse_existing,
    remove_abandoned,
    require_writable,
    sha256_of,
    staged_directory,
    write_atomically,
    write_output,
)
from advmoe_deploy.journal import Journal
from advmoe_deploy.process import require_private
from tests.cli.command_line import read_meanwhile


def test_staged_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    with pytest.raises(error), staged_directory(tmp_path / "out", overwrite=True) as partial:
        (partial / "a").write_text("new")
        raise error
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_existing_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="--overwrite"), staged_directory(tmp_path / "out"):
        pass


@pytest.mark.skipif(os.name == "nt", reason="Windows calls it otherwise")
def test_what_came_meanwhile_stays(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="out"), staged_directory(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis").touch()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["thesis"]


def test_overwrite_replaces(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with staged_directory(tmp_path / "out", overwrite=True) as partial:
            (partial / content).touch()
    assert os.listdir(tmp_path / "out") == ["two"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from advmoe_deploy.files import staged_directory\n"
        "with staged_directory(Path(sys.argv[1])) as p:\n"
        "    (p / 'half').touch(); print('ready', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    assert len(os.listdir(tmp_path)) == 1
    with staged_directory(tmp_path / "out") as partial:
        (partial / "whole").touch()
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_process_of_our_own_number_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".out.partial-{platform.node()}-{os.getpid()}-0123abcd"
    left.mkdir()
    aside = tmp_path / f".old.partial-{platform.node()}-{os.getpid()}-0123abcd.old"
    aside.mkdir()
    with staged_directory(tmp_path / "out") as partial:
        remove_abandoned(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {partial.name, "old"}


def test_old_directory_survives_a_kill_between_the_renames(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    aside = tmp_path / f".out.partial-{platform.node()}-{dead.pid}-0123abcd.old"
    aside.mkdir()
    (aside / "old").touch()
    with pytest.raises(RuntimeError), staged_directory(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert os.listdir(tmp_path / "out") == ["old"]


@pytest.mark.parametrize("renames", [1, 2])
def test_ctrl_c_between_the_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    rename, done = Path.rename, []

    def interrupted(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        done.append(target)
        if len(done) == renames:
            signal.raise_signal(signal.SIGINT)
        return renamed

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staged_directory(tmp_path / "out", overwrite=True) as p:
        (p / "new").touch()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == (["old"] if renames == 1 else ["new"])


def test_what_another_host_is_writing_stays(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    theirs = tmp_path / f".out.partial-another{platform.node()}-{dead.pid}-0123abcd"
    theirs.mkdir()
    with staged_directory(tmp_path / "out") as partial:
        assert platform.node() in partial.name
    assert theirs.is_dir()


def test_write_atomically(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file"]


def test_an_output_follows_links_to_what_is_there_and_to_what_is_not(tmp_path: Path) -> None:
    link, chained, target = tmp_path / "link", tmp_path / "chained", tmp_path / "to" / "target"
    link.symlink_to("to/target")
    chained.symlink_to(link)
    for name, content in ((link, b"one"), (chained, b"two"), (target, b"three")):
        write_output(name, content)
        assert target.read_bytes() == content
        assert os.listdir(target.parent) == ["target"]
    assert link.is_symlink()
    assert chained.is_symlink()


@pytest.mark.parametrize("overwrite", [True, False])
def test_links_in_a_circle_are_refused_before_the_work(tmp_path: Path, overwrite: bool) -> None:
    circle = tmp_path / "circle"
    circle.symlink_to("circle")
    with pytest.raises(OSError, match="links"):
        write_output(circle, b"")
    with pytest.raises(OSError, match="links"), staged_directory(circle, overwrite=overwrite):
        pytest.fail("the work began")
    with pytest.raises(OSError, match="links"):
        refuse_existing(circle, overwrite=overwrite, marker="manifest.json")
    assert os.listdir(tmp_path) == ["circle"]
    assert circle.is_symlink()


def test_a_place_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    kept, pipe, below = tmp_path / "kept", tmp_path / "pipe", tmp_path / "kept" / "new"
    kept.write_text("old")
    os.mkfifo(pipe)
    for path in (kept, pipe, tmp_path / "new"):
        require_writable(path)
    assert kept.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["kept", "pipe"]
    require_writable(tmp_path / "deep" / "deeper" / "new")
    for path in (below, tmp_path / ("n" * 300), tmp_path / "deep" / ("n" * 300)):
        with pytest.raises(OSError, match=path.name):
            require_writable(path)
    with pytest.raises(UsageError, match="is a directory"):
        require_writable(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["kept", "pipe"]


def test_an_output_goes_through_a_pipe(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for name in (pipe, link):
        with read_meanwhile(pipe) as read:
            write_output(name, b"content")
        assert read() == b"content"
        assert pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_an_output_joins_the_messages_that_go_to_the_same_file(tmp_path: Path) -> None:
    stdout, program = (
        tmp_path / "stdout",
        (
            "import sys; from pathlib import Path; from advmoe_deploy.files import write_output\n"
            "print('before', flush=True); write_output(Path(sys.argv[1]), b'output\\n')\n"
            "print('after', flush=True)\n"
        ),
    )
    (tmp_path / "link").symlink_to("/proc/self/fd/1")  # as /dev/stdout is
    for name in (stdout, *([tmp_path / "link"] if sys.platform == "linux" else [])):
        with stdout.open("ab") as file:
            file.truncate(0)
            command = [sys.executable, "-c", program, str(name)]
            subprocess.run(command, stdout=file, check=True, timeout=60)
        assert stdout.read_text() == "before\noutput\nafter\n"
    assert (tmp_path / "link").is_symlink()


def test_sha256_of_the_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256_of(tmp_path / "empty").startswith("e3b0c44298fc1c149afbf4c8996fb924")


def test_what_a_kill_left_of_single_files_is_swept(tmp_path: Path) -> None:
    write = (
        "import os, sys; from pathlib import Path; from advmoe_deploy import files\n"
        "files.os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "files.write_atomically(Path(sys.argv[1]) / 'a.json', b'{}')\n"
    )
    done = subprocess.run([sys.executable, "-c", write, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [name[:16] for name in os.listdir(tmp_path)] == [".a.json.partial-"]
    (tmp_path / "kept").touch()
    remove_abandoned(tmp_path)
    assert os.listdir(tmp_path) == ["kept"]


def test_what_windows_cannot_promise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(MachineError, match="cannot be locked on Windows"):
        Journal(tmp_path / "journal")
    with pytest.raises(InputError, match="checked on Windows, so no code is loaded from it"):
        require_private(tmp_path, 0o077)
    assert not os.listdir(tmp_path)

"""Batch inference that was stopped: what is kept, what goes on, and what is refused."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from data.packed import write_table, write_tar

from advmoe_deploy.bundle import MANIFEST, MANIFEST_HASH, Bundle, open_bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.files import sha256_of
from advmoe_deploy.serving.batch import classify_files
from advmoe_deploy.serving.resume import open_journal
from tests.conftest import Notes


class StopHereError(Exception):
    pass


class KilledAfter(Notes):
    """A listener that ends the run after some inputs."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.left = inputs

    def advance(self, task: str, steps: int = 1, **figures: float) -> None:
        self.left -= steps
        if self.left <= 0:
            raise StopHereError


def test_resume_continues_and_ends_with_the_same_bytes(
    tiny_bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    classify_files(tiny_bundle, str(folder), whole, batch=4)
    stopper = KilledAfter(8)
    with pytest.raises(StopHereError):
        classify_files(tiny_bundle, str(folder), output, batch=4, progress=stopper)
    assert stopper.notes == ["8 of 22 rows are kept; --resume continues from there"]
    journal = tmp_path / ".a.jsonl.partial.jsonl"
    with journal.open("a") as file:
        file.write('{"path": "torn in the mid')
    assert not output.exists()
    with pytest.raises(UsageError, match="--resume"):
        classify_files(tiny_bundle, str(folder), output, batch=4)
    report = classify_files(tiny_bundle, str(folder), output, batch=4, resume=True)
    assert (report.resumed, report.images, report.errors) == (8, 22, 2)
    assert output.read_bytes() == whole.read_bytes()
    assert not journal.exists()


def test_errors_of_the_listing_survive_a_resume(
    tiny_bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    shutil.copytree(folder, source)
    for name in ("00b.png", "02b.png", "zzz.png"):
        (source / name).symlink_to(f"nowhere-{name[:3]}")
    whole, output = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    classify_files(tiny_bundle, str(source), whole, batch=4)
    with pytest.raises(StopHereError):
        classify_files(tiny_bundle, str(source), output, batch=4, progress=KilledAfter(8))
    report = classify_files(tiny_bundle, str(source), output, batch=4, resume=True)
    assert (report.resumed, report.images, report.errors) == (8, 25, 5)
    assert output.read_bytes() == whole.read_bytes()
    with pytest.raises(StopHereError):
        classify_files(
            tiny_bundle, str(source), output, batch=4, overwrite=True, progress=KilledAfter(8)
        )
    (source / "nowhere-zzz").touch()  # one link that was an error is none any more
    with pytest.raises(UsageError, match="another inputs"):
        classify_files(tiny_bundle, str(source), output, batch=4, resume=True, overwrite=True)


def test_resume_refuses_another_job(tiny_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    with pytest.raises(StopHereError):
        classify_files(tiny_bundle, str(folder), output, batch=4, progress=KilledAfter(8))
    other = altered_copy(tiny_bundle, tmp_path / "bundle")
    with pytest.raises(UsageError, match="another bundle"):
        classify_files(other, str(folder), output, batch=4, resume=True)
    with pytest.raises(UsageError, match="another inputs"):
        classify_files(tiny_bundle, str(folder / "0*.png"), output, batch=4, resume=True)
    with pytest.raises(UsageError, match="another top_k"):
        classify_files(tiny_bundle, str(folder), output, batch=4, resume=True, top_k=1)
    report = classify_files(tiny_bundle, str(folder), output, batch=4, overwrite=True)
    assert report.resumed == 0


def altered_copy(bundle: Bundle, target: Path) -> Bundle:
    """Return the same bundle with another, valid manifest."""
    shutil.copytree(bundle.path, target)
    manifest = target / MANIFEST
    manifest.write_text(manifest.read_text().replace('"producer": "', '"producer": "another '))
    (target / MANIFEST_HASH).write_text(f"{sha256_of(manifest)}  {MANIFEST}\n")
    return open_bundle(target)


def test_resume_without_anything_to_resume_starts(
    tiny_bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    report = classify_files(tiny_bundle, str(folder), tmp_path / "a.jsonl", resume=True)
    assert (report.images, report.resumed) == (22, 0)


def test_a_journal_in_use_is_not_touched(tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    options: dict[str, Any] = {"batch": 1, "resume": False, "overwrite": True}
    with (
        open_journal(output, {"bundle": "b"}, ["x"], 1, **options)[0],
        pytest.raises(UsageError, match="another process"),
    ):
        open_journal(output, {"bundle": "b"}, ["x"], 1, **options)


def test_kill_9_loses_one_batch_at_most(tiny_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    images = [path.read_bytes() for path in sorted(folder.iterdir())]
    named = [(f"{i}.png", image) for i, image in enumerate(images * 60)]
    packed = [
        write_tar(tmp_path / "a.tar", named),
        write_table(tmp_path / "b.parquet", images * 60),
    ]
    lines = [*folder.iterdir()] * 80 + packed
    (tmp_path / "list.txt").write_text("".join(f"{p}\n" for p in lines))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    source = str(tmp_path / "list.txt")
    report = classify_files(tiny_bundle, source, whole, batch=4)
    assert (report.images, report.errors) == (4400, 400)
    command = ["predict", str(tiny_bundle.path), "--input", source, "--output", str(output)]
    command += ["--batch", "4", "--resume"]
    journal, kept = tmp_path / ".a.jsonl.partial.jsonl", 0
    for size in (whole.stat().st_size // 3, whole.stat().st_size * 4 // 5):
        run = subprocess.Popen([sys.executable, "-m", "advmoe_deploy.cli.app", *command])
        deadline = time.monotonic() + 60
        while not journal.exists() or journal.stat().st_size < size:
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not output.exists()
        assert journal.read_bytes().count(b"\n") > kept
        kept = journal.read_bytes().count(b"\n")
    report = classify_files(tiny_bundle, source, output, batch=4, resume=True)
    assert kept - 4 <= report.resumed + 1 < 4400
    assert output.read_bytes() == whole.read_bytes()

"""Batch inference by Ray: the rows of one process, whoever is killed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from data.packed import digits, write_table, write_tar

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import BackendUnavailableError, UsageError
from advmoe_deploy.serving import spread
from advmoe_deploy.serving.batch import classify_files
from tests.serving.processes import children

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or sys.platform != "linux",
    reason="Ray is not installed (extra 'ray'), or there is no /proc to find its workers in",
)
ROWS = 1500


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Files with relative names, a shard and a table, some unreadable, and one of another size."""
    images = digits(20)
    images[7] = b"text"
    (tmp_path / "a.png").write_bytes(images[0])
    write_tar(tmp_path / "b.tar", [(f"{i}.png", c) for i, c in enumerate(images * 37)])
    write_table(tmp_path / "c.parquet", images * 37, rows_per_group=300)
    (tmp_path / "list.txt").write_text("a.png\n" * 19 + "gone.png\nb.tar\nc.parquet\n")
    return "list.txt"


def a_worker(driver: int) -> int | None:
    """Return a worker of Ray that classifies, below the process ``driver``."""
    for pid in children(driver):
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_work"):
                return pid
        except OSError:
            continue
    return None


def waited_for(found: Callable[[], int | None], driver: "subprocess.Popen[bytes]") -> int:
    deadline = time.monotonic() + 240
    while (value := found()) is None:
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return value


def begun(bundle: Bundle, source: str, output: str, folder: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "advmoe_deploy.cli.app", "predict", str(bundle.path)]
    command += ["--input", source, "--output", output, "--batch", "2", "--on", "ray", "--resume"]
    environment = {**os.environ, "HOME": str(folder)}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [*command, "--json"], cwd=folder, env=environment, stdout=subprocess.PIPE
    )


def rows_kept(folder: Path, output: str, least: int) -> Callable[[], int | None]:
    journal = folder / f".{output}.partial.jsonl"

    def count() -> int | None:
        rows = journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0
        return rows if rows >= least else None

    return count


@pytest.mark.slow
@needs_ray
def test_ray_gives_the_rows_of_one_process_whoever_is_killed(
    tiny_bundle: Bundle, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = classify_files(tiny_bundle, source, tmp_path / "whole.jsonl", batch=2)
    assert (report.images, report.errors) == (ROWS, 1 + 2 * 37)
    whole = (tmp_path / "whole.jsonl").read_bytes()

    driver = begun(tiny_bundle, source, "worker.jsonl", tmp_path)
    for least in (1, ROWS // 2):
        waited_for(rows_kept(tmp_path, "worker.jsonl", least), driver)
        os.kill(waited_for(lambda: a_worker(driver.pid), driver), signal.SIGKILL)
    said, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0
    assert json.loads(said)["resumed"] == 0
    assert (tmp_path / "worker.jsonl").read_bytes() == whole
    assert not (tmp_path / ".ray").exists()  # where Ray would keep its token, for all to read

    driver = begun(tiny_bundle, source, "driver.jsonl", tmp_path)
    waited_for(rows_kept(tmp_path, "driver.jsonl", ROWS // 4), driver)
    begun_by_it = set(children(driver.pid))
    driver.kill()
    driver.communicate(timeout=60)
    assert not (tmp_path / "driver.jsonl").exists()
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in begun_by_it):
        assert time.monotonic() < deadline  # Ray ends with the process that began it
        time.sleep(0.1)
    journal = tmp_path / ".driver.jsonl.partial.jsonl"
    (tmp_path / ".here.jsonl.partial.jsonl").write_bytes(journal.read_bytes())
    report = classify_files(tiny_bundle, source, tmp_path / "here.jsonl", batch=2, resume=True)
    assert ROWS // 4 <= report.resumed < ROWS
    assert (tmp_path / "here.jsonl").read_bytes() == whole
    driver = begun(tiny_bundle, source, "driver.jsonl", tmp_path)
    said, _ = driver.communicate(timeout=240)
    assert json.loads(said)["resumed"] == report.resumed
    assert (tmp_path / "driver.jsonl").read_bytes() == whole


POISON = """
import os, sys
from pathlib import Path
from advmoe_deploy.bundle import open_bundle
from advmoe_deploy.errors import MachineError
from advmoe_deploy.serving.parts import Files, Inputs
from advmoe_deploy.serving.rows import RowFormat
from advmoe_deploy.serving.spread import SpreadJob, windows_by_ray

class Poison(Files):
    def reads(self, start):
        os._exit(1)

bundle = open_bundle(Path(sys.argv[1]))
columns = RowFormat(bundle.manifest.class_names, bundle.manifest.plan.routes)
job = SpreadJob.of(bundle, columns, "onnxruntime", 1, 2)
try:
    with windows_by_ray(job, Inputs((Poison(("a.png",)),)), 0) as windows:
        list(windows)
except MachineError as error:
    print(error)
"""


@pytest.mark.slow
@needs_ray
def test_an_input_that_ends_every_worker_ends_the_run(tiny_bundle: Bundle, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", POISON, str(tiny_bundle.path)], cwd=tmp_path,
        capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    said = ran.stdout.splitlines()[-1]  # what Ray says comes before, and in a command on stderr
    assert said.startswith("Ray's workers ended 4 times before their rows were done (")


@pytest.mark.slow
@needs_ray
def test_what_ends_a_worker_ends_the_run_in_one_line(
    tiny_bundle: Bundle, source: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "advmoe_deploy.cli.app", "predict", str(tiny_bundle.path)]
    command += ["--input", source, "--output", "a.jsonl", "--on", "ray"]
    for more, environment, code, text in (
        (["--engine", "openvino:int8"], {}, 3, "was not exported"),
        ([], {"RAY_ADDRESS": "127.0.0.1:1"}, 5, "Ray does not answer at RAY_ADDRESS=127.0.0.1:1"),
    ):
        ran = subprocess.run(
            [*command, *more], cwd=tmp_path, env={**os.environ, **environment},
            capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip
        assert ran.returncode == code, ran.stderr
        assert text in ran.stderr.replace("\n", " ")
        assert "Traceback" not in ran.stderr


TWICE = """
import os, sys
from pathlib import Path
from advmoe_deploy.bundle import open_bundle
from advmoe_deploy.serving.batch import classify_files

bundle = open_bundle(Path(sys.argv[1]))
for name in ("a", "b"):
    report = classify_files(bundle, "a.png", Path(name + ".jsonl"), on="ray")
    print(report.images, [key for key in os.environ if "TOKEN" in key])
"""


@pytest.mark.slow
@needs_ray
def test_a_run_leaves_no_token_behind(tiny_bundle: Bundle, source: str, tmp_path: Path) -> None:
    """In one process twice, since Ray reads its token once."""
    command = [sys.executable, "-c", TWICE, str(tiny_bundle.path)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    ran = subprocess.run(
        command, cwd=tmp_path, env={**environment, "HOME": str(tmp_path)},
        capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    assert ran.stdout.splitlines()[-2:] == ["1 []"] * 2


def test_the_token_is_there_for_the_run_alone_and_not_where_there_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(KeyError), spread._own_token():
        first = os.environ["RAY_AUTH_TOKEN"]
        raise KeyError
    assert "RAY_AUTH_TOKEN" not in os.environ
    with spread._own_token():
        assert os.environ["RAY_AUTH_TOKEN"] == first  # which Ray has read
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        with monkeypatch.context() as context:
            context.setenv(name, "mine")
            with spread._own_token():
                assert os.environ.get("RAY_AUTH_TOKEN", "mine") == "mine"
            assert os.environ[name] == "mine"


def test_without_ray_the_extra_is_named(
    tiny_bundle: Bundle, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailableError, match=r"advmoe-deploy\[ray\]"):
        classify_files(tiny_bundle, source, tmp_path / "a.jsonl", on="ray")
    with pytest.raises(UsageError, match="unknown place 'dask'; "):
        classify_files(tiny_bundle, source, tmp_path / "a.jsonl", on="dask")  # type: ignore[arg-type]
    command = ["predict", str(tiny_bundle.path), "--input", source, "--output", "a.jsonl"]
    assert run([*command, "--on", "ray"]) == 4
    assert not list(tmp_path.glob(".a.*"))

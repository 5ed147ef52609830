"""Under torchrun a process that fails is replaced, and the run goes on from a checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ADVMOE = ["-m", "advmoe_deploy.cli.app"]
ALONE = "--standalone"
TORCHRUN = ["-m", "torch.distributed.run", ALONE, "--nproc-per-node", "2"]
EPOCHS = 25
SETTINGS = {
    "model.width": 4,
    "epochs": EPOCHS,
    "batch_size": 150,
    "attack_steps": 1,
    "holdout_attack_steps": 1,
    "test_attack_steps": 1,
    "evaluate_every": 1,
}
TRAIN = [
    *ADVMOE,
    *("train", "digits-s-dense", "--out", "run", "--threads", "1"),
    *(word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")),
]


def children(pid: int) -> list[int]:
    """Return the processes that ``pid`` has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
        except OSError:
            continue  # it has ended
        if int(fields["PPid"]) == pid:
            found.append(int(status.parent.name))
    return sorted(found)


def kill_one_after(agent: subprocess.Popen[str], run: Path, epochs: int) -> None:
    """Kill a process of the run as soon as there are checkpoints of more than ``epochs``."""
    deadline = time.monotonic() + 240
    while not any((run / "checkpoints" / f"epoch-{epochs + n:04d}").exists() for n in (1, 2)):
        assert agent.poll() is None, "it ended too early"
        assert time.monotonic() < deadline, f"no checkpoint after epoch {epochs} came"
        time.sleep(0.02)
    os.kill(children(agent.pid)[-1], signal.SIGKILL)


def newest(run: Path) -> int:
    return max(int(path.name.removeprefix("epoch-")) for path in (run / "checkpoints").glob("e*"))


@pytest.mark.slow
def test_a_failed_process_is_replaced_and_the_run_goes_on(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, *TORCHRUN, "--max-restarts", "1", *TRAIN]
    with (
        log.open("w") as file,
        subprocess.Popen(command, cwd=tmp_path, stderr=file, stdout=file, text=True) as agent,
    ):
        kill_one_after(agent, run, 0)
        while "going on after epoch" not in log.read_text():
            assert agent.poll() is None, log.read_text()
            time.sleep(0.02)
        kill_one_after(agent, run, newest(run))
        assert agent.wait(timeout=120) != 0  # no restart is left
    before = newest(run)
    assert 0 < before < EPOCHS, "killed too late"
    done = subprocess.run(
        [sys.executable, *TRAIN, "--resume", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["devices"] == 1
    assert f"going on after epoch {before}" in done.stderr
    assert "so far with processes=2" in done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
    assert not list(run.rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [TORCHRUN, [each for each in TORCHRUN if each != ALONE]])
def test_a_run_that_is_in_the_way_is_refused_again_by_a_restart(
    torchrun: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("of a run that did not end")
    command = [sys.executable, *torchrun, "--max-restarts", "1", *TRAIN]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("run holds a run that did not end; pass --resume") == 2
    assert os.listdir(tmp_path / "run") == ["config.json"]

"""What benchmarks/gpu/main.py keeps when it is cut off, and goes on from."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu.bounds import bounds
from benchmarks.gpu.device import device, matrices
from benchmarks.gpu.main import Work, main, run_stage


class Stage:
    """Has two parts, counts how often each is measured, and fails where it is told to."""

    def __init__(self) -> None:
        self.counts = {"first": 0, "second": 0}
        self.problem: BaseException | None = None

    def __call__(self, work: Work) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "first", lambda: self.measure("first")
        yield "second", lambda: self.measure("second")

    def measure(self, name: str) -> dict[str, int]:
        self.counts[name] += 1
        if name == "second" and self.problem:
            raise self.problem
        return {"count": self.counts[name]}


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(
        folder=tmp_path,
        data="none",
        models=(),
        precisions=(),
        batches=(),
        images=0,
        seconds=0,
        level=None,
        trained=None,
        tensorrt_python=None,
        dry=False,
        again=False,
    )


def parts_of(work: Work) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = json.loads((work.records / "s.json").read_text())["parts"]
    return parts


def test_what_was_measured_stays_and_what_failed_is_tried_again(work: Work) -> None:
    stage, out = Stage(), work.folder / "out.json"
    stage.problem = ValueError("no\n luck")
    run_stage("s", stage, work, out)
    assert parts_of(work)["first"] == {"count": 1}
    assert parts_of(work)["second"]["failed"] == "ValueError: no luck"
    stage.problem = None
    run_stage("s", stage, work, out)
    assert parts_of(work) == {"first": {"count": 1}, "second": {"count": 2}}
    assert json.loads(out.read_text())["stages"]["s"]["parts"] == parts_of(work)
    run_stage("s", stage, dataclasses.replace(work, again=True), out)
    assert parts_of(work) == {"first": {"count": 2}, "second": {"count": 3}}


def test_what_twice_ends_the_process_is_left_out(work: Work) -> None:
    stage, out = Stage(), work.folder / "out.json"
    stage.problem = KeyboardInterrupt()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_stage("s", stage, work, out)
    run_stage("s", stage, work, out)
    assert stage.counts == {"first": 1, "second": 2}
    assert "ended" in parts_of(work)["second"]["failed"]


def test_another_machine_begins_anew(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    stage, out = Stage(), work.folder / "out.json"
    run_stage("s", stage, work, out)
    file = work.records / "s.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "python": "2.7"}))
    run_stage("s", stage, work, out)
    assert stage.counts == {"first": 2, "second": 2}
    assert "of another machine" in capsys.readouterr().out


def test_bounds_are_put_on_both_clocks_and_on_what_onnxruntime_answers() -> None:
    answer = {
        "max_relative_logit_diff_routed_alike": 2e-4,
        "routes": {"router": {"agreement": 1.0}},
    }
    latency = {
        "ratios": {"dense / moe": [2.0, 1.9, 2.1]},
        "device_ratios": {"dense / moe": [2.4, 2.3, 2.5]},
    }
    name = "advmoe-resnet18"
    measured = {
        "latency": {"parts": {f"{name} fp16 batch 256": latency}},
        "onnxruntime": {"parts": {f"{name} onnxruntime-cuda parity": answer}},
    }
    assert [(each["what"], each["holds"]) for each in bounds(measured)] == [
        (f"{name} onnxruntime-cuda fp32: logits, relative above 1", False),
        (f"{name} onnxruntime-cuda fp32: routes of router", True),
        ("fp16 batch 256: dense / moe, on the GPU", True),
        ("fp16 batch 256: dense / moe, from end to end", False),
    ]


def test_a_ceiling_is_taken_with_numbers_of_all_kinds(work: Work) -> None:
    dry = dataclasses.replace(work, precisions=("fp32", "fp16"), dry=True)
    run_stage("device", device, dry, work.folder / "out.json")
    parts = json.loads((dry.records / "device.json").read_text())["parts"]
    assert [part["max_relative_diff"] < 2e-3 for part in parts.values()] == [True, True]
    for values in matrices(64, "fp16").values():
        assert values.dtype == np.float16
        assert len(np.unique(values)) > 1000


def test_a_precision_without_bounds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["main", "--data", "none", "--work", str(tmp_path), "--precisions", "fp16,bf16"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.endswith("precision here is called bf16\n")

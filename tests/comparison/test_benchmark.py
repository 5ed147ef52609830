"""The table over all engines of a bundle: what is in it, and which is the best for an aim."""

import json
from pathlib import Path
from typing import Any

import pytest

import advmoe_deploy
from advmoe_deploy.bundle import MODEL, REFERENCE, Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.comparison.compare import _with_best, benchmark_bundle
from advmoe_deploy.comparison.report import BenchmarkReport, Contender, Timing
from advmoe_deploy.errors import BundleError, DataError, UsageError
from advmoe_deploy.profiling import profile
from advmoe_deploy.profiling.timing import time_interleaved
from advmoe_deploy.verify import verify as verify_module
from tests.cli.command_line import Capture, said


@pytest.fixture(scope="module")
def found(int8_bundle: Bundle) -> BenchmarkReport:
    return benchmark_bundle(int8_bundle, images=100, batches=(1, 4), threads=1)


def test_every_engine_and_the_dense_network_have_a_row(
    found: BenchmarkReport, int8_bundle: Bundle
) -> None:
    names = ["onnxruntime:fp32", "onnxruntime:int8", "dense network"]
    assert [each.name for each in found.contenders] == names
    fp32, int8, dense = found.contenders
    files = int8_bundle.manifest.files
    assert fp32.bytes == files[MODEL].bytes
    assert dense.bytes == files["baselines/dense.onnx"].bytes
    (engines,) = int8_bundle.manifest.engines
    assert int8.bytes == sum(files[s.file].bytes for s in engines.plan.segments)
    for each in found.contenders:
        assert [timing.batch for timing in each.timings] == [1, 4]
        assert all((t.dense_ratio is None) == (each is dense) for t in each.timings)


def test_accuracies_are_measured_or_recorded(found: BenchmarkReport, int8_bundle: Bundle) -> None:
    fp32, int8, dense = found.contenders
    measured = advmoe_deploy.evaluate(int8_bundle, engine="onnxruntime:int8", images=100)
    assert int8.clean is not None
    assert (int8.clean.share, int8.clean.images) == (measured.accuracy, 100)
    (engines,) = int8_bundle.manifest.engines
    assert engines.check is not None
    recorded = engines.check.robust_accuracy
    assert recorded is not None
    for each, share in ((fp32, recorded.reference), (int8, recorded.engine)):
        assert each.robust is not None
        assert each.robust.share == pytest.approx(share)
        assert "at the export: pgd-10" in each.robust.source
    assert (dense.clean, dense.robust) == (None, None)


def contender(name: str, size: int, at_1: float, at_8: float) -> Contender:
    times = ((1, at_1), (8, at_8))
    timings = tuple(Timing(batch=n, p50_ms=ms, images_per_s=1e3 * n / ms) for n, ms in times)
    fixed = {"precision": "fp32", "clean": None, "robust": None, "timings": timings}
    model = "dense" if name == "dense" else "own"
    return Contender(model=model, engine=name, bytes=size, **fixed)


@pytest.mark.parametrize(("aim", "best"), [("latency", "a"), ("throughput", "b"), ("size", "c")])
def test_the_best_is_the_one_for_the_aim(aim: str, best: str) -> None:
    rows = (("a", 30, 1.0, 9.0), ("b", 20, 2.0, 3.0), ("c", 10, 3.0, 9.0), ("dense", 1, 0.1, 0.1))
    marked = _with_best([contender(*row) for row in rows], aim)  # type: ignore[arg-type]
    assert [each.engine for each in marked if each.best] == [best]


def test_the_command_marks_the_best(capsys: Capture, int8_bundle: Bundle) -> None:
    command = ["benchmark", str(int8_bundle.path), "--images", "20", "--batch", "1"]
    assert run([*command, "--aim", "size"]) == 0
    out = capsys.readouterr().out
    assert out.count("* ") == 2  # the row, and the line on it
    for text in ("dense network", "clean %", "robust %", "ms at 1", "best for size"):
        assert text in out
    assert "holds no other engine" not in out
    assert max(map(len, out.splitlines()[:5])) <= 80


def test_a_lone_engine_and_no_attacks_are_told_with_the_way_out(
    capsys: Capture, trained_bundle: Bundle
) -> None:
    command = ["benchmark", str(trained_bundle.path), "--images", "20", "--batch", "1"]
    assert run(command) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "export its run again with --overwrite and --format openvino or --precision int8" in out
    assert "robust accuracy is not measured unless asked for: --attacks quick does" in out


def test_without_data_the_rest_is_measured_and_attacks_are_refused(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    gone = f"folder:{tmp_path / 'gone'}?size=8"
    with pytest.raises(DataError, match="gone"):
        benchmark_bundle(tiny_bundle, data=gone)
    known = tiny_bundle.manifest
    moved = Bundle(tiny_bundle.path, known.model_copy(update={"training": {"data": gone}}))
    with pytest.raises(UsageError, match="attacks need labelled images"):
        benchmark_bundle(moved, attacks="quick")
    with pytest.raises(DataError, match="gone"):  # a map asks for images as well
        benchmark_bundle(moved, class_map={"a": "b"})
    report = benchmark_bundle(moved, batches=(1,), threads=1)
    assert report.notes[0].startswith("clean accuracy is unmeasured: ")
    assert [each.robust for each in report.contenders] == [None, None, None]
    files = {name: record for name, record in known.files.items() if name != REFERENCE}
    bare = Bundle(tiny_bundle.path, known.model_copy(update={"files": files}))
    with pytest.raises(BundleError, match="reference weights"):
        benchmark_bundle(bare, images=4, attacks="quick")


def test_nonsense_is_refused(capsys: Capture, tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="did you mean latency"):
        advmoe_deploy.benchmark(tiny_bundle, aim="latenc")  # type: ignore[arg-type]
    for options, message in (
        (["--aim", "speed"], "'latency', 'throughput', 'size'"),
        (["--batch", "0"], "'0' is no list of positive numbers"),
    ):
        assert run(["benchmark", str(tiny_bundle.path), *options]) == 2
        line = said(capsys)
        assert message in line


@pytest.mark.parametrize("ended", [0, 1])
def test_a_crash_of_the_timing_keeps_what_was_measured(
    ended: int, capsys: Capture, int8_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    def time(*arguments: Any, **options: Any) -> Any:
        if len(batches) == ended:
            raise RuntimeError("the engine died")
        batches.append(1)
        return time_interleaved(*arguments, **{**options, "rounds": 2})

    monkeypatch.setattr(profile, "time_interleaved", time)
    command = ["benchmark", str(int8_bundle.path), "--images", "20", "--batch", "1,2"]
    assert run([*command, "--json"]) == 70
    kept = json.loads(capsys.readouterr().out)
    assert kept["exit_code"] == 70
    assert "the engine died" in kept["error"]
    assert [each["engine"] for each in kept["measured"]] == ["onnxruntime"] * 3
    assert [(each["clean"] or {}).get("images") for each in kept["measured"]] == [20, 20, None]
    for each in kept["measured"]:
        assert [timing["batch"] for timing in each["timings"]] == [1][:ended]
    batches.clear()
    assert run(command) == 70
    out = capsys.readouterr().out
    for text in ("unfinished", "onnxruntime:int8", "clean %", *["ms at 1"][:ended]):
        assert text in out


def test_a_crash_of_the_attacks_keeps_the_accuracy_on_clean_images(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(*_: object, **__: object) -> None:
        raise RuntimeError("the attack died")

    monkeypatch.setattr(verify_module, "verify_bundle", verify)
    measured: list[Contender] = []
    with pytest.raises(RuntimeError, match="the attack died"):
        benchmark_bundle(tiny_bundle, images=8, attacks="quick", measured=measured)
    (first,) = measured
    assert first.clean is not None
    assert (first.name, first.clean.images) == ("onnxruntime:fp32", 8)

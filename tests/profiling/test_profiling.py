"""Timings are interleaved, reported with their settings, and compared by ratio."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import UsageError
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.profiling.profile import profile_bundle
from advmoe_deploy.profiling.timing import ratio_of_medians, time_interleaved
from advmoe_deploy.progress import Silent
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.select import ENGINES
from advmoe_deploy.specs import Precision
from tests.conftest import TINY, write_run
from tests.export.test_export import Steps


def test_calls_are_interleaved_and_counted() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = time_interleaved(calls, rounds=20, warmup=2)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 20, "b": 20, "c": 20}
    assert len(order) == 3 * 22
    rounds = [tuple(order[i : i + 3]) for i in range(6, 66, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert all((values > 0).all() for values in seconds.values())


def test_calls_that_settle_go_before_each_that_is_timed() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    seconds = time_interleaved(calls, rounds=5, warmup=1, settle=2)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 5, "b": 5}
    rounds = [order[i : i + 6] for i in range(2, 2 + 5 * 6, 6)]
    assert len(order) == 2 + 5 * 6
    assert all(one in ([*"aaabbb"], [*"bbbaaa"]) for one in rounds)


def test_the_collector_rests_meanwhile_and_comes_back() -> None:
    seen = []
    assert gc.isenabled()
    time_interleaved({"a": lambda: seen.append(gc.isenabled())}, rounds=2, warmup=1)
    assert seen == [False] * 3
    assert gc.isenabled()


def test_rounds_are_told_of_as_they_end() -> None:
    order: list[str] = []

    class Rounds(Silent):
        def start(self, task: str, total: int, done: int = 0) -> None:
            order.append(f"{task} of {total}")

        def advance(self, task: str, steps: int = 1, **figures: float) -> None:
            order.append("told")

    calls = {"a": lambda: order.append("call")}
    time_interleaved(calls, rounds=2, warmup=1, progress=Rounds(), name="batch 8")
    assert order == ["call", "batch 8 of 2", "call", "told", "call", "told"]


def test_rounds_follow_the_budget() -> None:
    few = time_interleaved({"a": lambda: None}, budget_s=0.0, least=30)
    many = time_interleaved({"a": lambda: None}, budget_s=5.0, most=40)
    assert (len(few["a"]), len(many["a"])) == (30, 40)


def test_a_ratio_by_hand() -> None:
    b = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    ratio = ratio_of_medians(2 * b, b)  # each round twice as slow, however slow the round
    assert ratio.value == 2
    assert ratio.low == pytest.approx(2)
    assert ratio.high == pytest.approx(2)


def test_an_interval_holds_its_ratio() -> None:
    draw = np.random.default_rng(0)
    ratio = ratio_of_medians(draw.normal(3, 0.3, 200), draw.normal(1, 0.1, 200))
    assert ratio.low < ratio.value < ratio.high
    assert ratio.low == pytest.approx(3, abs=0.2)


def test_neighbouring_rounds_that_resemble_each_other_widen_the_interval() -> None:
    draw = np.random.default_rng(0)
    drift = np.zeros(400)
    for i in range(1, 400):
        drift[i] = 0.95 * drift[i - 1] + draw.normal(0, 0.01)
    steady = np.ones(400)
    together = ratio_of_medians(1 + drift, steady)
    shuffled = ratio_of_medians(1 + draw.permutation(drift), steady)
    assert together.high - together.low > 2 * (shuffled.high - shuffled.low)


def test_a_ratio_says_what_each_side_ran_on(tiny_bundle: Bundle) -> None:
    report = profile_bundle(
        tiny_bundle, engines=("openvino:fp32",), batches=(2,), against=("dense",), n=3, threads=1
    )
    (ratio,) = report.ratios
    assert (ratio.a_engine, ratio.engine, ratio.precision) == ("onnxruntime", "openvino", "fp32")
    assert [row.precision for row in report.rows] == ["fp32", "fp32"]
    assert report.versions.keys() >= {"onnxruntime", "openvino"}


def test_a_profile_has_all_rows_and_ratios(tiny_bundle: Bundle) -> None:
    samples: dict[str, list[float]] = {}
    steps = Steps()
    report = profile_bundle(
        tiny_bundle,
        engines=("onnxruntime", "onnxruntime-plan"),
        batches=(1, 5),
        n=5,
        threads=1,
        samples=samples,
        progress=steps,
    )
    assert steps.left == {"profile": 0, "batch 1": 0, "batch 5": 0}
    assert len(report.rows) == 2 * (2 + 3)
    assert len(report.ratios) == 2 * 2 * 3
    macs = tiny_bundle.manifest.macs
    assert {row.model: row.macs for row in report.rows} == {
        "moe": macs.executed,
        "dense": macs.dense,
        "s-dense": macs.s_dense,
        "unfused": macs.unfused,
    }
    for row in report.rows:
        assert row.n == 5
        assert 0 < row.p50_ms <= row.p90_ms <= row.p99_ms
        assert row.images_per_s == pytest.approx(1e3 * row.batch / row.p50_ms)
    for ratio in report.ratios:
        assert ratio.b == "moe"
        assert ratio.ci_low <= ratio.ratio <= ratio.ci_high
    assert report.settings["spinning"] is False
    assert sum(int(n) for n in str(report.settings["router.expert_load_5"]).split(",")) == 5
    assert report.versions.keys() >= {"onnxruntime"}
    assert len(samples["dense onnxruntime fp32, batch 5"]) == 5


def test_what_was_timed_outlives_a_failure(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("advmoe_deploy.profiling.profile._ratios", crash)
    command = ["profile", str(tiny_bundle.path), "--batch", "1,2", "--against", ""]
    assert run([*command, "--json"]) == 5
    assert [row["batch"] for row in json.loads(capsys.readouterr().out)["measured"]] == [1]


def test_it_says_what_rounds_to_tf32(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = ENGINES["onnxruntime-plan"]

    def rounding(bundle: Bundle, precision: Precision, threads: int) -> Runner:
        runner = exact(bundle, precision, threads)
        monkeypatch.setattr(runner, "tf32", True)
        return runner

    monkeypatch.setitem(ENGINES, "onnxruntime-plan", rounding)
    engines = ("onnxruntime", "onnxruntime-plan")
    report = profile_bundle(
        tiny_bundle, engines=engines, batches=(1,), against=(), n=2, warmup=1, threads=1
    )
    assert report.settings["rounded_to_tf32"] == "moe onnxruntime-plan fp32"


def test_a_dense_bundle_is_profiled_alone_and_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TINY.dense())
    export_run(run, tmp_path / "bundle", data="random:4")
    report = profile_bundle(open_bundle(tmp_path / "bundle"), batches=(2,), n=3, threads=1)
    assert [row.model for row in report.rows] == ["dense"]
    assert report.ratios == ()
    assert report.settings["left_out"] == "dense, s-dense, unfused: the bundle has no such graph"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engines": ("tensort",)}, "unknown engine"),
        ({"against": ("dens",)}, "did you mean dense"),
        ({"engines": ("onnxruntime", "onnxruntime:fp32")}, "onnxruntime fp32 twice"),
        ({"batches": (0,)}, "batch=0"),
        ({"batches": ()}, "at least one"),
        ({"n": 1}, "n=1"),
        ({"warmup": 0}, "warmup=0"),
        ({"threads": -2}, "threads=-2"),
    ],
)
def test_nonsense_is_refused(tiny_bundle: Bundle, change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        profile_bundle(tiny_bundle, **change)

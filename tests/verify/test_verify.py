"""Verification passes what survived and fails what did not."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from advmoe_deploy.bundle import (
    MANIFEST,
    MANIFEST_HASH,
    REFERENCE,
    Bundle,
    open_bundle,
)
from advmoe_deploy.cli.app import run
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import BundleError, UsageError
from advmoe_deploy.models.stored import reference_model
from advmoe_deploy.reports import PrecisionReport
from advmoe_deploy.runtime.runner import Prediction, Runner
from advmoe_deploy.runtime.select import ENGINES, open_runner
from advmoe_deploy.sealing.seal import seal_bundle
from advmoe_deploy.specs import Precision, build_spec
from advmoe_deploy.verify import trial as trial_module
from advmoe_deploy.verify.curve import robustness_curve
from advmoe_deploy.verify.suites import Suite, attack_suite, routing_targets
from advmoe_deploy.verify.verify import verify_bundle
from tests.verify.planted.graphs import graphs_of


def resealed(path: Path, bundle: Bundle) -> Bundle:
    """Give a changed copy a manifest that fits it again, as somebody who meant it would."""
    for name in (MANIFEST, MANIFEST_HASH):
        (path / name).unlink()
    kept = {"schema_version", "created", "producer", "files"}
    fields = {k: v for k, v in bundle.manifest if k not in kept}
    seal_bundle(path, **fields)
    return open_bundle(path)


def spoil_heads(model: onnx.ModelProto, heads: int) -> int:
    """Reverse the classes in the heads of the first pathways; return how many were reversed."""
    biases = [t for graph in graphs_of(model.graph) for t in graph.initializer]
    biases = sorted((t for t in biases if t.name.endswith("linear.bias")), key=lambda t: t.name)
    for graph in graphs_of(model.graph):
        for tensor in graph.initializer:
            of_a_head = any(
                tensor.name == bias.name.removesuffix("bias") + part
                for bias in biases[:heads]
                for part in ("weight", "bias")
            )
            if of_a_head:
                rows = np.ascontiguousarray(numpy_helper.to_array(tensor)[::-1])
                tensor.CopyFrom(numpy_helper.from_array(rows, tensor.name))
    return len(biases[:heads])


def test_an_honest_export_passes(tiny_bundle: Bundle) -> None:
    report = verify_bundle(tiny_bundle, images=100, threads=2, allow_fragile=True)
    assert report.passed
    assert report.images == 100
    assert report.route_agreement == 1.0
    assert report.parity.passed
    assert report.robust_accuracy.engine <= report.clean_accuracy.engine
    low, high = report.robust_interval
    assert low <= report.robust_accuracy.engine <= high
    assert report.verdict == "passed"
    assert report.findings == ()
    assert [a.found_on for a in report.attacks] == ["reference"] * 3 + ["engine"]
    assert [a.attack.target for a in report.attacks[:3]] == ["model", "pathway", "soft"]
    stands = [a.robust_accuracy.engine for a in report.attacks]
    assert stands == sorted(stands, reverse=True)
    assert stands[-1] == report.robust_accuracy.engine
    assert [a.images for a in report.attacks[1:]] == [round(100 * s) for s in stands[:-1]]


def test_what_rounds_to_tf32_is_attacked_by_its_own_answers(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounding(bundle: Bundle, precision: Precision, threads: int) -> Runner:
        runner = open_runner(bundle, f"onnxruntime:{precision}", threads=threads)
        monkeypatch.setattr(runner, "tf32", True)
        return runner

    monkeypatch.setitem(ENGINES, "tensorrt", rounding)
    report = verify_bundle(tiny_bundle, engine="tensorrt:fp32", images=20, threads=1)
    assert (report.precision, report.tf32) == ("fp32", True)
    assert [a.found_on for a in report.attacks] == ["reference"] * 4 + ["engine"] * 4
    assert report.transferred_accuracy >= report.robust_accuracy.engine


@pytest.mark.parametrize(("asked", "agrees"), [(0.999, False), (0.8, True)])
def test_as_many_routes_may_differ_as_the_export_was_told(
    asked: float, agrees: bool, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rerouting(bundle: Bundle, precision: Precision, threads: int) -> Runner:
        runner = open_runner(bundle, "onnxruntime:fp32", threads=threads)
        infer = runner.infer

        def infer_elsewhere(images: np.ndarray) -> Prediction:
            answer = infer(images)
            answer.expert_ids["router"][images[:, 0, 0, 2] > 0.75] ^= 1  # 4 of the first 40
            return answer

        monkeypatch.setattr(runner, "precision", precision)
        monkeypatch.setattr(runner, "infer", infer_elsewhere)
        return runner

    monkeypatch.setitem(ENGINES, "openvino", rerouting)
    check = PrecisionReport.model_construct(least_route_agreement=asked)
    (engines,) = tiny_bundle.manifest.engines
    engines = engines.model_copy(update={"precision": "int8", "check": check})
    manifest = tiny_bundle.manifest.model_copy(update={"engines": (engines,)})
    told = Bundle(tiny_bundle.path, manifest)
    report = verify_bundle(told, engine="openvino:int8", images=40, threads=1, budget=1e-3)
    assert report.route_agreement == 0.9
    assert (not report.findings) == agrees, report.findings


def spoilt(bundle: Bundle, path: Path, heads: int) -> Bundle:
    """Return a copy of ``bundle`` whose first ``heads`` pathways answer with the wrong classes."""
    shutil.copytree(bundle.path, path)
    model = onnx.load(path / "model.onnx")
    assert spoil_heads(model, heads) == heads
    onnx.save(model, path / "model.onnx")
    return resealed(path, bundle)


def test_robustness_that_survived_passes(trained_bundle: Bundle) -> None:
    report = verify_bundle(trained_bundle, images=150, max_drop=0.0)
    assert report.passed
    assert min(report.parity.layers[0].expert_load) > 10
    assert report.clean_accuracy.engine > 0.8
    assert report.robust_accuracy.engine > 0.4
    assert all(a.route_agreement == 1.0 for a in report.attacks)


def test_both_runners_verify(trained_bundle: Bundle) -> None:
    one, other = (
        verify_bundle(trained_bundle, engine=engine, images=60, threads=1)
        for engine in ("onnxruntime", "onnxruntime-plan")
    )
    assert one.robust_accuracy == other.robust_accuracy


def test_one_expert_that_was_lost_fails(trained_bundle: Bundle, tmp_path: Path) -> None:
    report = verify_bundle(spoilt(trained_bundle, tmp_path / "spoilt", heads=1), images=150)
    assert not report.passed
    assert not report.parity.passed
    assert report.route_agreement == 1.0  # the router still does its part
    assert report.robust_accuracy.engine < report.robust_accuracy.reference - 0.1


def test_the_command_exits_1_when_robustness_was_lost(
    trained_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = spoilt(trained_bundle, tmp_path / "spoilt", heads=2)
    assert run(["verify", str(bundle.path), "--images", "40"]) == 1
    printed = capsys.readouterr()
    assert "THE ENGINE ANSWERS OTHERWISE" in printed.out
    assert "advmoe: error: class-logits: " in printed.err.splitlines()[-1]


def crash(*_: object) -> None:
    raise IndexError("a bug in the last attack")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_crash_is_no_failed_check_and_loses_nothing(
    tiny_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
) -> None:
    monkeypatch.setattr(trial_module, "attack_predictions", crash)
    options = ["--json"] if as_json else []
    assert run(["verify", str(tiny_bundle.path), "--images", "5", *options]) == 70
    printed = capsys.readouterr()
    assert "unexpected IndexError: a bug in the last attack" in printed.err.splitlines()[-1]
    if as_json:
        found = json.loads(printed.out)
        assert found["exit_code"] == 70
        targets = [outcome["attack"]["target"] for outcome in found["measured"]]
        assert targets == ["model", "pathway", "soft"]
    else:
        assert "unfinished" in printed.out
        assert printed.out.count("pgd-20") == 3


def test_no_reference_no_verification(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "bare"
    shutil.copytree(tiny_bundle.path, path)
    (path / REFERENCE).unlink()
    with pytest.raises(BundleError, match="without --no-reference"):
        verify_bundle(resealed(path, tiny_bundle))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": 0}, "at least one"),
        ({"epsilon": 2.0}, "outside"),
        ({"data": "digit"}, "did you mean digits"),
        ({"engine": "onnxruntim"}, "did you mean onnxruntime"),
    ],
)
def test_nonsense_is_refused(tiny_bundle: Bundle, options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        verify_bundle(tiny_bundle, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("suite", ["quick", "standard", "full"])
def test_suites(suite: Suite) -> None:
    moe = build_spec(family="advmoe", num_experts=2, ratio=0.5)
    attacks, dense = attack_suite(suite, moe), attack_suite(suite, moe.dense())
    for each in (attacks, dense):
        assert each[0].name == "pgd"
        assert each[0].target == "model"
        names = [attack.name for attack in each if attack.name != "autoattack"]
        black_boxes = ["square"] if suite == "quick" else ["square", "rays"]
        assert names[-len(black_boxes) :] == black_boxes
        assert names.count("square") == 1
        assert ("autoattack" in {attack.name for attack in each}) == (suite == "full")
        assert len(set(each)) == len(each)
    if suite == "full":
        forms = [a.target for a in attacks if a.name == "autoattack"]
        assert forms == ["model", "straight-through", "soft"]
    assert {a.target for a in dense} == {"model"}
    assert {"model", "pathway", "soft"} <= {a.target for a in attacks}
    if suite != "quick":
        assert {"straight-through", "weakest"} <= {a.target for a in attacks}
        assert {a.temperature for a in attacks if a.target == "soft"} == {0.1, 0.5, 2.0}
    weighted = moe.model_copy(update={"family": "experts-block", "weighting": "probability"})
    assert "straight-through" not in routing_targets(weighted)


def test_accuracy_falls_along_the_curve(tiny_bundle: Bundle) -> None:
    model = reference_model(tiny_bundle)
    points = robustness_curve(model, load_dataset("digits").test, (0.0, 0.05, 0.5), steps=5)
    accuracies = [point.accuracy for point in points]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] < 0.05

"""int8 at work: the answers of its engines, in every command."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from advmoe_deploy.bundle import Bundle, EngineSet, open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.export.precision.casts import lowered
from advmoe_deploy.export.targets import Target
from advmoe_deploy.export.tensorrt.builders import OnCpu
from advmoe_deploy.profiling.profile import profile_bundle
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.runner import Prediction, Runner
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.runtime.tensorrt.load import graph_files
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile
from advmoe_deploy.verify.verify import verify_bundle
from tests.export.precision.int8 import IMAGES, any_drop, engines_of

ENGINES = ("onnxruntime", "onnxruntime-plan", "openvino", "openvino-plan")


def test_around_int8_it_is_float16_where_that_is_asked_for(
    bundle: Bundle, trained_run: Path, tmp_path: Path
) -> None:
    target = Target(
        "tensorrt", "int8", onnx_only=True, build=BuildOptions(unquantised_dtype="fp16")
    )
    with any_drop():
        half = export_run(trained_run, tmp_path / "bundle", targets=[target])
    engines, before = engines_of(half, "tensorrt"), engines_of(bundle, "tensorrt")
    low = [name for name, precision in engines.segments.items() if precision == "int8"]
    assert {"router.expert-0", "router.expert-1"} <= {*low}
    assert {engines.compute_dtypes[name] for name in low} == {"fp16"}
    assert {before.compute_dtypes[n] for n, p in before.segments.items() if p == "int8"} == {"fp32"}
    assert "what int8 leaves unquantised is fp16" in engines.findings()
    for segment in (s for s in engines.plan.segments if s.name in low):
        model = onnx.load_model(half.file(segment.file))
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 19)]
        constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        made = {name: node for node in model.graph.node for name in node.output}
        for node in (n for n in model.graph.node if n.op_type == "Conv"):
            given = [made[name] for name in node.input[:2]]
            assert {n.op_type for n in given} == {"DequantizeLinear"}
            assert {constants[n.input[1]].dtype for n in given} == {np.dtype(np.float16)}
            assert all(constants[name].dtype == np.float16 for name in node.input[2:])
        ends = {end.type.tensor_type.elem_type for end in model.graph.output}
        assert ends <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    with open_set(half, engines) as runner, open_set(bundle, before) as other:
        answer, expected = runner.infer(IMAGES), other.infer(IMAGES)
    same_N = same_routes(answer, expected)
    change = np.linalg.norm((answer.logits - expected.logits)[same_N])
    assert 0 < change / np.linalg.norm(expected.logits) < 0.05  # a step of int8 here and there


def same_routes(answer: Prediction, expected: Prediction) -> NDArray[np.bool_]:
    """Return which images go to the same expert: one route in 1,000 may differ, and may be here."""
    same_N: NDArray[np.bool_] = (answer.expert_ids["router"] == expected.expert_ids["router"])[:, 0]
    assert same_N.sum() >= len(same_N) - 1
    return same_N


def open_set(bundle: Bundle, engines: EngineSet) -> Runner:
    """Return TensorRT's graphs in ONNX Runtime."""
    files = {name: bundle.file(file) for name, file in graph_files(engines.plan).items()}
    return OnCpu(BatchProfile(max=64)).runner(engines.plan, files, (1, 8, 8), "int8")


@pytest.mark.parametrize("value", [1e-9, 2e-8, 1e-3])
def test_a_scale_in_float16_is_never_0(value: float) -> None:
    scale = onnx.numpy_helper.from_array(np.array(value, np.float32), "scale")
    zero = onnx.numpy_helper.from_array(np.array(0, np.int8), "zero")
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "quantise"),
        onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], "dequantise"),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N"]) for n in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [scale, zero])
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    low = lowered(model, "fp16", [])
    onnx.checker.check_model(low, full_check=True)
    x_N = np.array([0.0, 100.0 * value, -50.0 * value], np.float32)
    with OrtEngine(low.SerializeToString()) as engine:
        (answer_N,) = engine.run({"x": x_N}).values()
    assert np.isfinite(answer_N).all()
    np.testing.assert_allclose(answer_N, x_N, atol=max(6e-8, value))


@pytest.mark.parametrize("engine", ENGINES)
def test_answers_resemble_those_of_fp32_at_any_batch_size(bundle: Bundle, engine: str) -> None:
    with open_runner(bundle, "onnxruntime:fp32", threads=1) as exact:
        expected = exact.infer(IMAGES)
    with open_runner(bundle, engine, threads=1) as runner:
        assert (runner.name, runner.precision) == (engine, "int8")  # the bundle's own
        whole = runner.infer(IMAGES)
        parts = [runner.infer(part) for part in np.split(IMAGES, [1, 3, 10])]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(runner.infer, [IMAGES] * 8))
    logits = np.concatenate([part.logits for part in parts])
    # Without VNNI the kernel, and with it a step of int8, depends on the batch's size.
    moved_N = np.linalg.norm(logits - whole.logits, axis=1) / np.linalg.norm(whole.logits, axis=1)
    assert moved_N.max() < 0.1
    for answer in together:
        np.testing.assert_array_equal(answer.logits, whole.logits)
    same_N = same_routes(whole, expected)
    change = np.linalg.norm((whole.logits - expected.logits)[same_N])
    assert 1e-3 < change / np.linalg.norm(expected.logits) < 0.2


def test_every_command_runs_it(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = verify_bundle(bundle, engine="openvino:int8", images=40, threads=1)
    assert (report.engine, report.precision) == ("openvino:int8", "int8")
    assert report.route_agreement >= 39 / 40  # one route in 1,000 may differ, and may be here
    pairs = [(a.attack.name, a.found_on) for a in report.attacks]
    names = ("pgd", "pgd", "pgd", "square")
    assert pairs == [(name, on) for on in ("reference", "engine") for name in names]
    assert report.attacks[-1].robust_accuracy == report.robust_accuracy
    assert report.robust_accuracy.engine <= report.transferred_accuracy
    rows = profile_bundle(
        bundle, engines=("openvino", "onnxruntime:fp32"), batches=(4,), against=(), n=2, threads=1
    ).rows
    assert [(r.engine, r.precision) for r in rows] == [
        ("openvino", "int8"),
        ("onnxruntime", "fp32"),
    ]
    for index, image in enumerate(load_dataset("digits").test.images[:5]):
        Image.fromarray(image[0]).save(tmp_path / f"{index}.png")
    output = tmp_path / "answers.jsonl"
    arguments = ["--input", str(tmp_path / "*.png"), "--output", str(output), "--threads", "1"]
    assert run(["predict", str(bundle.path), "--engine", "openvino:int8", *arguments]) == 0
    assert len([json.loads(line) for line in output.read_text().splitlines()]) == 5
    capsys.readouterr()
    assert run(["inspect", str(bundle.path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "engine openvino:int8" in shown
    assert "256 attacked by pgd-10 at epsilon 0.05, seed 0" in shown
    assert "`--engine onnxruntime:int8`" in bundle.file("MODEL_CARD.md").read_text()


def test_the_first_precision_rules(trained_run: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "bundle"), "--no-reference"]
    precisions = ["--precision", "fp32", "--precision", "int8"]
    with any_drop():
        assert run(["export", str(trained_run), "--format", "onnx", *precisions, *out]) == 0
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.engine_set("onnxruntime", "int8")
    with open_runner(bundle, threads=1) as runner:
        assert runner.precision == "fp32"

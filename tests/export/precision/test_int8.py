"""int8, from a robust model to answers: calibrated, examined, recorded, run by every command."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from advmoe_deploy.bundle import Bundle, EngineSet, open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import BundleError, CheckFailedError, DataError
from advmoe_deploy.export.checks.images import labelled_images
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.export.precision import gate
from advmoe_deploy.export.precision.casts import lowered
from advmoe_deploy.export.precision.quantize import quantised_segments
from advmoe_deploy.export.targets import Target
from advmoe_deploy.export.tensorrt.builders import OnCpu
from advmoe_deploy.models.checkpoint import load_checkpoint, save_checkpoint
from advmoe_deploy.profiling.profile import profile_bundle
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.runner import Prediction, Runner
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.runtime.tensorrt.load import graph_files
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile
from advmoe_deploy.verify.verify import verify_bundle
from tests.conftest import TINY, assert_nothing_left, write_run

TARGETS = (
    Target("openvino", "int8"),
    Target("onnxruntime", "int8"),
    Target("tensorrt", "int8", onnx_only=True),
)
ENGINES = ("onnxruntime", "onnxruntime-plan", "openvino", "openvino-plan")
IMAGES = to_float(load_dataset("digits").test.images[:40])


# Why a segment is not int8, or none is.
REASON = (
    r"(\d+\.\d\d % of the clear routes of a layer agree, less than 99\.90 %"
    r"|(clean accuracy|robust accuracy( under an attack of its own)?) falls by [^;]+)"
)


@contextmanager
def any_drop() -> Iterator[None]:
    """Let every drop in accuracy pass: the images that int8 loses differ by CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "MAX_DROP", 100.0)
        yield


@pytest.fixture(scope="module")
def bundle(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An export in which all experts are int8, and the router where its routes agree."""
    out = tmp_path_factory.mktemp("int8") / "bundle"
    with any_drop():
        export_run(trained_run, out, targets=TARGETS)
    return open_bundle(out)


def engines_of(bundle: Bundle, backend: str) -> EngineSet:
    return next(each for each in bundle.manifest.engines if each.backend == backend)


def assert_recorded(bundle: Bundle, backend: str) -> set[str]:
    """Check the record of what was lowered, why the rest was not, and what it cost."""
    engines = engines_of(bundle, backend)
    lowered = {name for name, precision in engines.segments.items() if precision == "int8"}
    assert lowered
    segments = (*bundle.manifest.plan.segments, *engines.plan.segments)
    files = {segment.name: segment.file for segment in segments} | engines.files
    for name in engines.segments:
        nodes = onnx.load_model(bundle.file(files[name])).graph.node
        assert any(n.op_type == "DequantizeLinear" for n in nodes) == (name in lowered)
    check, calibration = engines.check, engines.calibration
    assert check is not None
    assert calibration is not None
    assert check.raised.keys() == engines.segments.keys() - lowered
    assert all(re.fullmatch(REASON, reason) for reason in check.raised.values())
    assert engines.parity.route_agreement >= check.least_route_agreement == 0.999
    assert check.holdout_images == 200
    assert check.clean_accuracy is not None
    assert check.robust_accuracy is not None
    assert check.robust_accuracy.reference > 0.3
    assert check.data == "digits"
    assert check.own_attack is not None
    assert check.own_attack.least_drop <= check.max_drop
    assert [(a.target, a.steps) for a in check.attacks] == [("model", 10), ("pathway", 10)]
    assert check.attack == check.attacks[0]
    assert check.pathway_images == 200
    assert list(check.drops) == ["clean", "robust", "own_attack"]
    pairs = (check.clean_accuracy, check.robust_accuracy, check.own_attack.robust_accuracy)
    for drop, pair in zip(check.drops.values(), pairs, strict=True):
        assert (drop.images, drop.max_drop) == (200, check.max_drop)
        assert drop.verdict != "failed"
        assert drop.least_drop <= drop.drop <= drop.most_drop
        assert drop.drop == pytest.approx(100 * (pair.reference - pair.engine))
        assert f"{drop.verdict} (limit {check.max_drop:g} points)" in str(drop)
        assert str(drop) in "\n".join(engines.findings())
        assert drop.drop <= check.max_drop or drop.p / 2 >= 0.2
    assert check.own_attack.robust_accuracy.engine <= check.robust_accuracy.engine
    assert (calibration.clean_images, calibration.attacked_images) == (256, 256)
    assert (calibration.data, calibration.epsilon) == ("digits", 0.05)
    if backend == "tensorrt":  # another machine's engines: nothing is timed here
        assert check.router is None
    else:
        assert (check.router is not None) == ("routes" in check.raised.get("router", ""))
    return lowered


def quick_on_one(target: Target) -> object:
    marks = [] if target.backend == "onnxruntime" else [pytest.mark.slow]
    return pytest.param(target, id=target.backend, marks=marks)


@pytest.mark.parametrize("target", [quick_on_one(target) for target in TARGETS])
def test_the_gates_verdict_is_recorded(trained_run: Path, tmp_path: Path, target: Target) -> None:
    out, refusal = tmp_path / "bundle", ""
    try:
        bundle = export_run(trained_run, out, targets=[target])
    except CheckFailedError as error:
        refusal = str(error)
    if refusal:  # another CPU's rounding may lose an image more than the gate allows
        said = f"nothing of this model can run in int8: {REASON}; no bundle was written; use a "
        assert re.fullmatch(rf"{said}higher precision", refusal)
        assert_nothing_left(out)
        return
    assert_recorded(bundle, target.backend)
    check = engines_of(bundle, target.backend).check
    assert check is not None
    assert check.max_drop == 0.5


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_what_was_lowered_and_what_it_cost_is_recorded(bundle: Bundle, backend: str) -> None:
    lowered = assert_recorded(bundle, backend)
    assert lowered >= {"router.expert-0", "router.expert-1"}
    assert engines_of(bundle, backend).files.keys() == lowered


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_weights_are_int8_and_logits_are_not(bundle: Bundle, backend: str) -> None:
    graph = onnx.load_model(bundle.file(engines_of(bundle, backend).files["router.expert-0"])).graph
    types = Counter(tensor.data_type for tensor in graph.initializer)
    assert types[onnx.TensorProto.INT8] >= 20  # its convolutions and its head
    made = {name: node for node in graph.node for name in node.output}
    assert made[graph.output[0].name].op_type == "Gemm"
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    for node in convolutions:
        assert {made[name].op_type for name in node.input} == {"DequantizeLinear"}


def test_residual_sums_are_int8_for_tensorrt_alone(bundle: Bundle) -> None:
    for_cpu = {engines_of(bundle, "onnxruntime").files["router.expert-0"]}
    engines = engines_of(bundle, "tensorrt")
    low = [name for name, precision in engines.segments.items() if precision == "int8"]
    for_tensorrt = {s.file for s in engines.plan.segments if s.name in low}
    for files, rounded in ((for_cpu, False), (for_tensorrt, True)):
        for graph in (onnx.load_model(bundle.file(file)).graph for file in files):
            sums = {name for node in graph.node if node.op_type == "Add" for name in node.output}
            quantised = {n.input[0] for n in graph.node if n.op_type == "QuantizeLinear"}
            assert sums
            assert sums & quantised == (sums if rounded else set())


def test_tensorrt_gets_zero_points_of_0_and_biases_in_float32(bundle: Bundle) -> None:
    engines = engines_of(bundle, "tensorrt")
    low = [name for name, precision in engines.segments.items() if precision == "int8"]
    assert low
    for segment in (s for s in engines.plan.segments if s.name in low):
        graph = onnx.load_model(bundle.file(segment.file)).graph
        constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        quantisers = [n for n in graph.node if n.op_type.endswith("quantizeLinear")]
        quantisers += [n for n in graph.node if n.op_type == "QuantizeLinear"]
        assert len(quantisers) > 20
        for node in quantisers:
            zero = constants[node.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any()
        made = {name: node for node in graph.node for name in node.output}
        for node in (n for n in graph.node if n.op_type == "Conv"):
            assert {made[name].op_type for name in node.input[:2]} == {"DequantizeLinear"}
            assert all(constants[name].dtype == np.float32 for name in node.input[2:])


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


def test_a_changed_quantised_file_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    name = engines_of(bundle, "onnxruntime").files["router.expert-1"]
    (copy / name).write_bytes((copy / name).read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"router\.expert-1\.onnx is not what was exported"):
        open_bundle(copy)


def test_an_expert_that_no_image_visits_is_calibrated_on_the_others_rows(
    tiny_bundle: Bundle,
) -> None:
    plan = tiny_bundle.manifest.plan
    graphs = {s.name: onnx.load_model(tiny_bundle.file(s.file)) for s in plan.segments}
    with open_runner(tiny_bundle) as runner:
        ids_N = runner.infer(IMAGES).expert_ids["router"][:, 0]
    first = IMAGES[ids_N == 0]
    assert 0 < len(first) < len(IMAGES)
    quantised, unvisited = quantised_segments(plan, graphs, first, TINY.image_shape)
    assert unvisited == ("router.expert-1",)
    assert quantised.keys() == graphs.keys()
    _, unvisited = quantised_segments(plan, graphs, IMAGES, TINY.image_shape)
    assert unvisited == ()


def test_without_training_images_there_is_no_int8(tmp_path: Path) -> None:
    source = write_run(tmp_path / "run", TINY)
    checkpoint, model = load_checkpoint(source / "model")
    nameless = checkpoint.model_copy(update={"provenance": {}})
    (tmp_path / "nameless" / "model").mkdir(parents=True)
    save_checkpoint(tmp_path / "nameless" / "model", nameless, model)
    out = tmp_path / "bundle"
    with pytest.raises(DataError, match=r"calibrated on training images.*pass --data"):
        export_run(tmp_path / "nameless", out, data="random:8", targets=TARGETS)
    assert_nothing_left(out)


def test_labelled_images_are_of_the_models_kind(tmp_path: Path) -> None:
    checkpoint, _ = load_checkpoint(write_run(tmp_path / "run", TINY) / "model")
    said: list[str] = []

    def found(sources: list[str], **other: object) -> bool:
        of = checkpoint.model_copy(update=other)
        return labelled_images(sources, of, said.append) is not None

    assert found(["", "random:8", "digits"])
    assert not found(["random:8"])
    assert said == []
    assert not found(["digits"], model=TINY.model_copy(update={"image_size": 16}))
    assert not found(["digits"], model=TINY.model_copy(update={"num_classes": 9}))
    assert not found(["digits"], class_names=tuple("abcdefghij"))
    assert not found([f"folder:{tmp_path / 'nowhere'}"])
    reasons = ["its images are", "it has 10 classes", "called otherwise", "nowhere"]
    for line, reason in zip(said, reasons, strict=True):
        assert line.startswith("accuracy is not measured on ")
        assert reason in line


def test_the_first_precision_rules(trained_run: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "bundle"), "--no-reference"]
    precisions = ["--precision", "fp32", "--precision", "int8"]
    with any_drop():
        assert run(["export", str(trained_run), "--format", "onnx", *precisions, *out]) == 0
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.engine_set("onnxruntime", "int8")
    with open_runner(bundle, threads=1) as runner:
        assert runner.precision == "fp32"

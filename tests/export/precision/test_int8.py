"""int8 from a robust model: calibrated, examined, recorded."""

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.errors import BundleError, CheckFailedError, DataError, UsageError
from advmoe_deploy.export.checks.images import labelled_images
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.export.precision.quantize import quantised_segments
from advmoe_deploy.export.targets import Target
from advmoe_deploy.models.checkpoint import load_checkpoint, save_checkpoint
from advmoe_deploy.runtime.select import open_runner
from tests.conftest import TINY, assert_nothing_left, write_run
from tests.export.precision.int8 import IMAGES, TARGETS, any_drop, engines_of

# Why a segment is not int8, or none is.
REASON = (
    r"(\d+\.\d\d % of the clear routes of a layer agree, less than 99\.90 %"
    r"|(clean accuracy|robust accuracy( under an attack of its own)?) falls by [^;]+)"
)


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
    made = {name: node for node in graph.node for name in node.output}
    head = made[graph.output[0].name]
    assert head.op_type == "Gemm"
    assert made[head.input[0]].op_type != "DequantizeLinear"
    assert head.input[1] in {
        t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT
    }
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert types[onnx.TensorProto.INT8] >= len(convolutions) >= 20
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


def test_a_router_keeps_as_many_routes_as_it_is_told_to(tmp_path: Path) -> None:
    source = write_run(tmp_path / "run", TINY)
    checkpoint, model = load_checkpoint(source / "model")
    (tmp_path / "unattacked" / "model").mkdir(parents=True)
    unattacked = checkpoint.model_copy(update={"threat": None})
    save_checkpoint(tmp_path / "unattacked" / "model", unattacked, model)
    target = Target("onnxruntime", "int8", least_route_agreement=0.0)
    with any_drop():
        bundle = export_run(tmp_path / "unattacked", tmp_path / "bundle", targets=[target])
    (engines,) = bundle.manifest.engines
    assert {*engines.segments.values()} == {"int8"}
    assert engines.check is not None
    assert engines.check.least_route_agreement == 0.0
    assert not engines.check.raised


def test_labelled_images_are_of_the_models_kind(tmp_path: Path) -> None:
    checkpoint, _ = load_checkpoint(write_run(tmp_path / "run", TINY) / "model")
    said: list[str] = []

    def found(sources: list[str], **other: object) -> bool:
        of = checkpoint.model_copy(update=other)
        return labelled_images(sources, of, said.append) is not None

    assert found(["", "random:8", "digits"])
    assert not found(["random:8"])
    assert said == []
    # A map that was asked for is not left out with a note.
    with pytest.raises(UsageError, match=r"^digits: --class-map flowr"):
        labelled_images(["digits"], checkpoint, said.append, {"flowr": "flower"})
    assert not found(["digits"], model=TINY.model_copy(update={"image_size": 16}))
    assert not found(["digits"], model=TINY.model_copy(update={"num_classes": 9}))
    assert not found(["digits"], class_names=tuple("abcdefghij"))
    assert not found([f"folder:{tmp_path / 'nowhere'}"])
    reasons = ["its images are", "it has 10 classes", "called otherwise", "nowhere"]
    for line, reason in zip(said, reasons, strict=True):
        assert line.startswith("accuracy is not measured on ")
        assert reason in line

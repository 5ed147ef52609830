"""The graphs that TensorRT is given: standard ONNX, run here by ONNX Runtime, for every family."""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from advmoe_deploy.bundle import EngineSet, open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import BackendUnavailableError, CheckFailedError
from advmoe_deploy.export.engine_sets import write_engine_set
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.export.graph.unfused import unfused_graph
from advmoe_deploy.export.partition.cut import partition
from advmoe_deploy.export.passes.apply import apply_passes
from advmoe_deploy.export.precision.casts import fits_fp16, for_cpu, lowered, precision_of
from advmoe_deploy.export.precision.gate import AnsweredImages
from advmoe_deploy.export.subject import Subject, subject_of
from advmoe_deploy.export.targets import Target, require_supported
from advmoe_deploy.export.tensorrt import backend
from advmoe_deploy.export.tensorrt.from_bundle import build_from_bundle
from advmoe_deploy.export.tensorrt.graphs import tensorrt_plan
from advmoe_deploy.export.tensorrt.row_graphs import RowGraph, row_graphs
from advmoe_deploy.export.tensorrt.trtexec import build_script
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.parity.tolerance import row_differences
from advmoe_deploy.plan import ExpertsStep, Plan, RunStep
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.runtime.tensorrt.rows import ROWS
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile, Shapes
from advmoe_deploy.specs import ModelSpec, Precision
from tests.conftest import TINY, assert_nothing_left
from tests.families import FAMILIES, spec_of

IMAGES = np.random.default_rng(3).random((48, 1, 8, 8), dtype=np.float32)
TRT, SET = ("--format", "trt"), ("--set-build",)
SMALL = BuildOptions(batch=BatchProfile(min=1, opt=8, max=32))


def target(precision: Precision) -> Target:
    return Target("tensorrt", precision, onnx_only=True, build=SMALL)


def subject_for(spec: ModelSpec) -> Subject:
    model = untrained_model(spec, torch.from_numpy(IMAGES))
    parts, _ = apply_passes(partition(model), IMAGES, model.rules)
    examples = AnsweredImages(IMAGES, reference_answers(model, IMAGES))
    return subject_of(model, parts, examples, data="noise", labelled=None, threat=None)


def written(folder: Path, engines: EngineSet) -> dict[str, onnx.ModelProto]:
    files = sorted((folder / "engines").rglob("*.onnx"))
    return {file.name.removesuffix(".onnx"): onnx.load_model(file) for file in files}


PRUNED = TINY.model_copy(update={"num_experts": 3, "dropped_experts": {"router": (1,)}})


@pytest.mark.parametrize("family", ["advmoe", "pruned", *FAMILIES])
def test_the_graphs_answer_what_torch_answers(family: str, tmp_path: Path) -> None:
    spec = {"advmoe": TINY, "pruned": PRUNED}.get(family) or spec_of(family)
    subject = subject_for(spec)
    engines = write_engine_set(tmp_path, target("fp32"), subject)
    graphs = written(tmp_path, engines)
    assert {s.name for s in engines.plan.segments} <= graphs.keys()
    for graph in graphs.values():
        onnx.checker.check_model(graph, full_check=True)
        assert not graph.functions
        assert {(entry.domain, entry.version) for entry in graph.opset_import} == {("", 17)}
        assert {node.domain for node in graph.graph.node} <= {""}
        assert not {"If", "Loop", "NonZero"} & {node.op_type for node in graph.graph.node}
    assert not any(step.kind == "route" for step in engines.plan.steps)
    files = {s.name: tmp_path / s.file for s in engines.plan.segments}
    expected = subject.gate.parity.answers
    with PlanRunner(engines.plan, files, spec.image_shape) as runner:
        answer = runner.infer(IMAGES)
    _, relative_N = row_differences(answer.logits, expected.logits)
    assert relative_N.max() <= engines.parity.logit_tolerance <= 1e-3
    for layer, route in expected.routes.items():
        ids = answer.expert_ids[layer].reshape(route.expert_ids.shape)
        assert (np.sort(ids, axis=1) == np.sort(route.expert_ids, axis=1)).mean() > 0.99
        assert answer.expert_ids[layer].dtype == np.int64
        assert answer.weights[layer].shape == answer.expert_ids[layer].shape


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", ["conv experts", "token experts"])
def test_a_lower_precision_is_in_the_graph_and_scores_are_not(
    family: str, precision: Precision, tmp_path: Path
) -> None:
    subject = subject_for(spec_of(family))
    engines = write_engine_set(tmp_path, target(precision), subject)
    graphs, kind = written(tmp_path, engines), {"fp16": 10, "bf16": 16}[precision]
    low = [name for name, chosen in engines.segments.items() if chosen == precision]
    assert low
    for name in low:
        types = Counter(tensor.data_type for tensor in graphs[name].graph.initializer)
        assert types[kind] > 0
        assert precision_of(graphs[name]) == precision
        ends = [*graphs[name].graph.input, *graphs[name].graph.output]
        assert {end.type.tensor_type.elem_type for end in ends} <= {
            TensorProto.FLOAT,
            TensorProto.INT64,
        }
    scored: set[str] = set()
    for name in {s.segment for s in engines.plan.steps if isinstance(s, RunStep)}:
        inferred = onnx.shape_inference.infer_shapes(graphs[name]).graph
        types_of = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
        for route in engines.plan.inside:
            if route.scores in types_of:
                scored.add(route.scores)
                assert types_of[route.scores] == TensorProto.FLOAT
            assert f"{route.scores}.low" not in types_of
    assert scored == {route.scores for route in engines.plan.inside}
    assert engines.check is not None
    assert engines.parity.route_agreement >= 0.999
    assert 0 < engines.parity.max_abs_logit_diff < 0.2


def test_the_network_of_all_experts_runs_in_float16_too() -> None:
    subject = subject_for(TINY)
    plan = subject.parts.plan
    half = lowered(unfused_graph(plan, subject.parts.graphs), "fp16", plan.routes)
    onnx.checker.check_model(half, full_check=True)
    with OrtEngine(half.SerializeToString()) as engine:  # which wants nodes' names to differ
        logits = engine.run({"images": IMAGES})["logits"]
    answers = subject.gate.parity.answers
    # A closer call may go the other way, for float16 rounds the scores as well.
    clear_N = answers.routes["router"].margins > 0.01
    assert clear_N.sum() > 40
    np.testing.assert_allclose(logits[clear_N], answers.logits[clear_N], atol=0.05)


def test_what_float16_cannot_hold_stays_in_float32() -> None:
    weight = onnx.numpy_helper.from_array(np.array([[7e4]], np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 1]) for n in "xy"]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert not fits_fp16(model)
    low = lowered(model, "bf16", [])
    onnx.checker.check_model(low, full_check=True)
    with OrtEngine(for_cpu(low).SerializeToString()) as engine:
        (answer,) = engine.run({"x": np.array([[1.0]], np.float32)}).values()
    assert answer[0, 0] == 70144  # the nearest of eight significant bits
    half = lowered(_times(model, 0.1), "fp16", [])
    with OrtEngine(half.SerializeToString()) as engine:
        (answer,) = engine.run({"x": np.array([[1.0]], np.float32)}).values()
    assert answer[0, 0] == 7000


def _times(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    (weight,) = changed.graph.initializer
    values = onnx.numpy_helper.to_array(weight) * np.float32(factor)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "w"))
    return changed


@pytest.fixture(scope="module")
def bundle_of_graphs(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trt") / "bundle"
    (config := out.parent / "build.json").write_text('{"batch": {"max": 32}, "workspace_mib": 1}')
    options = ["--onnx-only", "--build-config", str(config)]
    options += ["--set-build", "batch.opt=8", "--set-build", "workspace_mib=512"]
    precisions = ["--precision", "fp32", "--precision", "fp16"]
    assert (
        run(["export", str(tiny_run), "--format", "trt", *precisions, *options, "--out", str(out)])
        == 0
    )
    return out


def test_graphs_and_script_are_recorded_and_hashed(bundle_of_graphs: Path) -> None:
    manifest = open_bundle(bundle_of_graphs).manifest
    assert [(e.backend, e.precision, e.device) for e in manifest.engines] == [
        ("tensorrt", "fp32", None),
        ("tensorrt", "fp16", None),
    ]
    for engines in manifest.engines:
        folder = f"engines/trt-onnx-{engines.precision}"
        assert {s.file for s in engines.plan.segments} <= manifest.files.keys()
        assert f"{folder}/build.sh" in manifest.files
        assert not engines.is_built
        assert engines.findings()[0].startswith("to be built on a GPU")
    card = (bundle_of_graphs / "MODEL_CARD.md").read_text()
    assert "graphs for `tensorrt:fp16`" in card


def test_the_script_calls_trtexec_once_per_graph(bundle_of_graphs: Path, tmp_path: Path) -> None:
    folder = bundle_of_graphs / "engines" / "trt-onnx-fp16"
    record = tmp_path / "calls"
    program = tmp_path / "trtexec"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {record}\n')
    program.chmod(0o755)
    environment = {**os.environ, "TRTEXEC": str(program), "OUT": str(tmp_path / "engines")}
    subprocess.run([folder / "build.sh"], env=environment, check=True, timeout=60)
    calls = record.read_text().splitlines()
    graphs = sorted(file.name for file in folder.glob("*.onnx"))
    assert sorted(call.split()[0].removeprefix("--onnx=") for call in calls) == graphs
    assert len(calls) >= 3
    for call in calls:
        assert "--stronglyTyped --noTF32 --memPoolSize=workspace:512" in call
        assert "--fp16" not in call
    (router,) = [call for call in calls if "--onnx=router.onnx" in call]
    assert (
        "--profile=0 "
        "--minShapes=images:1x1x8x8 --optShapes=images:8x1x8x8 --maxShapes=images:32x1x8x8 "
        "--profile=1 "
        "--minShapes=images:1x1x8x8 --optShapes=images:1x1x8x8 --maxShapes=images:1x1x8x8 "
        in router
    )
    (expert,) = [call for call in calls if "--onnx=router.expert-1.onnx" in call]
    assert "--optShapes=images:4x1x8x8 --maxShapes=images:32x1x8x8" in expert
    record.unlink()
    subprocess.run([folder / "build.sh"], env={**environment, "WEAK": "1"}, check=True, timeout=60)
    (expert,) = [c for c in record.read_text().splitlines() if "--onnx=router.expert-1.onnx" in c]
    assert "--fp16 --noTF32" in expert
    (router,) = [c for c in record.read_text().splitlines() if "--onnx=router.onnx" in c]
    assert "--fp16" not in router  # close scores would change places
    assert "--stronglyTyped" not in expert
    assert "--profile" not in expert
    assert expert.count("Shapes=") == 3


def test_the_script_tries_no_other_libraries_than_those_named() -> None:
    shapes = {"router": {"images": Shapes((1, 3), (8, 3), (32, 3))}}
    named = BuildOptions(tactic_sources=("JIT_CONVOLUTIONS", "CUDNN"))
    assert (
        "--tacticSources=-CUBLAS,-CUBLAS_LT,+CUDNN,-EDGE_MASK_CONVOLUTIONS,+JIT_CONVOLUTIONS "
        in build_script(shapes, {}, {}, named)
    )
    assert "--tacticSources" not in build_script(shapes, {}, {}, BuildOptions())


def test_what_is_built_elsewhere_is_not_rounded_here() -> None:
    build = BuildOptions(tf32=True)
    assert Target("tensorrt", "fp32", onnx_only=True, build=build).is_exact
    assert not Target("tensorrt", "fp32", build=build).is_exact
    assert not Target("tensorrt", "fp16").is_exact
    assert Target("openvino", "fp32").is_exact


def test_every_expert_is_forced(tmp_path: Path) -> None:
    subject = subject_for(TINY)
    broken = onnx.ModelProto()
    broken.CopyFrom(subject.parts.graphs["router.expert-0"])
    subject.parts.graphs["router.expert-1"].CopyFrom(broken)  # type: ignore[attr-defined]
    with pytest.raises(CheckFailedError):
        write_engine_set(tmp_path, target("fp32"), subject)


def test_what_moves_rows_is_examined_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_the_last(plan: Plan) -> tuple[RowGraph, ...]:
        """Return graphs that gather rows counted from the end."""
        made = row_graphs(plan)
        for row_graph in made:
            (gather,) = row_graph.graph.graph.node
            gather.input[1] = "from the last"
            minus = helper.make_node("Neg", [ROWS], ["from the last"], "minus")
            row_graph.graph.graph.node.insert(0, minus)
        return made

    monkeypatch.setattr(backend, "row_graphs", from_the_last)
    with pytest.raises(CheckFailedError, match=r"trt-onnx-fp32.*logits"):
        write_engine_set(tmp_path, target("fp32"), subject_for(TINY))


def has_gpu() -> bool:
    try:
        require_supported(Target("tensorrt", "fp32"))
    except BackendUnavailableError:
        return False
    return True


@pytest.mark.skipif(has_gpu(), reason="there is a GPU, and TensorRT")
def test_without_a_gpu_it_ends_with_advice_and_nothing_is_left(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert run(["export", str(tiny_run), "--format", "trt", "--out", str(out)]) == 4
    complaint = capsys.readouterr().err
    assert "pip install 'advmoe-deploy[gpu]'" in complaint
    assert "--onnx-only" in complaint
    assert "--format trt-rtx compiles engines" in complaint
    assert complaint.count("\n") == 1
    assert_nothing_left(out)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--format", "onnx", *SET, "tf32=true"], "go with --format trt"),
        (["--format", "openvino", "--onnx-only"], "goes with --format trt"),
        ([*TRT, *SET, "batch.min=8", *SET, "batch.max=4"], "batch sizes must grow"),
        ([*TRT, *SET, "batch.max=many"], "batch.max: Input should be a valid integer"),
        ([*TRT, *SET, "bach.max=4"], "did you mean batch.max"),
        ([*TRT, *SET, "tf32"], "write key=value"),
        ([*TRT, *SET, "optimization_level=6"], "less than or equal to 5"),
        ([*TRT, *SET, "tactic_sources=CUDNN,CUBLASS"], "'CUBLAS'"),
        ([*TRT, *SET, "unquantised_dtype=fp16"], "--precision int8"),
        (["--format", "openvino", "--precision", "int8", *SET, "unquantised_dtype=fp16"], "trt"),
        ([*TRT, "--precision", "int8", *SET, "unquantised_dtype=bf16"], "'fp32' or 'fp16'"),
        ([*TRT, "--onnx-only", *SET, "tactic_sources=x"], "'CUDNN', 'EDGE_MASK_CONV"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", "no run", *options]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_build_config_that_is_no_json_object(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "build.json").write_text(content, encoding="latin-1")
    assert run(["export", "no run", *TRT, "--build-config", str(file)]) == 3
    assert "holds no JSON object" in capsys.readouterr().err


def test_batch_sizes_follow_from_those_that_are_given() -> None:
    given = [BatchProfile(), BatchProfile(max=32), BatchProfile(opt=2048), BatchProfile(min=100)]
    assert [(b.min, b.opt, b.max) for b in given] == [
        (1, 64, 1024),
        (1, 32, 32),
        (1, 2048, 2048),
        (100, 100, 1024),
    ]


def test_doctor_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)["gpu"]
    assert {"NVIDIA driver", "GPU", "CUDA for Python", "TensorRT"} <= parts.keys()
    for part in parts.values():
        assert (part["found"] is None) != (part["missing"] is None)


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no GPU, or no TensorRT")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_engines_are_built_examined_and_recorded(
    precision: Precision, tiny_run: Path, tmp_path: Path
) -> None:
    wanted = Target("tensorrt", precision, build=SMALL)
    export_run(tiny_run, tmp_path / "bundle", targets=[wanted])
    (engines,) = open_bundle(tmp_path / "bundle").manifest.engines
    assert engines.is_built
    assert engines.device is not None
    assert {s.file for s in engines.plan.segments} == {
        f"engines/trt-{precision}-{engines.device.slug}/{s.name}.engine"
        for s in engines.plan.segments
    }


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no GPU, or no TensorRT")
def test_engines_are_built_of_a_bundle(bundle_of_graphs: Path, tmp_path: Path) -> None:
    source = open_bundle(bundle_of_graphs)
    bundle = build_from_bundle(source, tmp_path / "bundle", build=SMALL)
    assert [e.is_built for e in bundle.manifest.engines] == [False, False, True, True]
    with open_runner(open_bundle(bundle.path), "tensorrt:fp16") as runner:
        assert runner.infer(IMAGES).logits.shape == (48, 10)


def test_the_plan_routes_inside() -> None:
    plan = subject_for(spec_of("block experts")).parts.plan
    changed = tensorrt_plan(plan, "engines/x", ".engine")
    assert changed.routes == changed.inside == plan.routes
    kinds = [step.kind for step in changed.steps]
    assert kinds == [step.kind for step in plan.steps if step.kind != "route"]
    for route in plan.routes:
        (maker,) = [s for s in changed.segments if route.made[0] in s.outputs]
        assert route.scores not in {tensor.name for tensor in maker.outputs}
    assert changed.tensors().keys() == plan.tensors().keys() - {r.scores for r in plan.routes}
    assert all(s.file == f"engines/x/{s.name}.engine" for s in changed.segments)
    assert any(isinstance(step, ExpertsStep) for step in changed.steps)

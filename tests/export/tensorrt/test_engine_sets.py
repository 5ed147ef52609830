"""The graphs that TensorRT is given: standard ONNX, run here by ONNX Runtime, for every family."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from advmoe_deploy.bundle import EngineSet
from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.engine_sets import write_engine_set
from advmoe_deploy.export.graph.unfused import unfused_graph
from advmoe_deploy.export.precision.casts import fits_fp16, for_cpu, lowered, precision_of
from advmoe_deploy.export.targets import Target
from advmoe_deploy.export.tensorrt import backend
from advmoe_deploy.export.tensorrt.graphs import tensorrt_plan
from advmoe_deploy.export.tensorrt.row_graphs import RowGraph, row_graphs
from advmoe_deploy.parity.tolerance import row_differences
from advmoe_deploy.plan import ExpertsStep, Plan, RunStep
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.runtime.tensorrt.rows import ROWS
from advmoe_deploy.specs import Precision
from tests.conftest import TINY
from tests.export.tensorrt.subjects import IMAGES, SMALL, subject_for
from tests.families import FAMILIES, spec_of


def target(precision: Precision) -> Target:
    return Target("tensorrt", precision, onnx_only=True, build=SMALL)


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

"""Experts of linear layers become one node per layer; any other stays in its branch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.checks.every_expert import require_every_expert
from advmoe_deploy.export.graph.grouped import are_groupable
from advmoe_deploy.export.graph.stitch import Form, graph_from_plan
from advmoe_deploy.export.partition.cut import Partition, partition
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.runtime.onnxruntime.custom_ops import find_custom_ops
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.specs import ModelSpec, Weighting
from tests.conftest import TINY
from tests.families import spec_of

IMAGES = np.random.default_rng(0).random((8, 1, 8, 8), dtype=np.float32)
KERNELS = find_custom_ops("auto")
SPEC = spec_of("token experts")
LAYER = "block-0"
FORMS: tuple[Form, Form] = ("if", "grouped")


def parts_of(spec: ModelSpec) -> Partition:
    return partition(untrained_model(spec, torch.from_numpy(IMAGES)))


@pytest.fixture
def parts() -> Partition:
    """A V-MoE: two layers of three experts, two for each token."""
    return parts_of(SPEC)


def experts_of(parts: Partition) -> list[ModelProto]:
    return [parts.graphs[f"{LAYER}.expert-{expert}"] for expert in range(3)]


def logits(model: ModelProto, form: str = "auto") -> np.ndarray:
    with OrtEngine(model.SerializeToString(), threads=1, custom_ops=form) as engine:
        return engine.run({"images": IMAGES})["logits"]


def count(model: ModelProto, operator: str) -> int:
    return sum(node.op_type == operator for node in model.graph.node)


@pytest.mark.parametrize(
    ("top_k", "weighting"), [(1, "one"), (1, "probability"), (2, "renormalised")]
)
def test_grouped_experts_answer_what_those_in_branches_do(top_k: int, weighting: Weighting) -> None:
    parts = parts_of(SPEC.model_copy(update={"top_k": top_k, "weighting": weighting}))
    branches, grouped = (graph_from_plan(parts.plan, parts.graphs, f) for f in FORMS)
    assert (count(branches, "If"), count(branches, "ExpertLinear")) == (6, 0)
    assert (count(grouped, "If"), count(grouped, "ExpertLinear")) == (0, 4)
    onnx.checker.check_model(grouped, full_check=True)
    expected = logits(branches)
    found = [logits(grouped, form) for form in ("auto", "bodies")]
    found.append(ReferenceEvaluator(grouped).run(["logits"], {"images": IMAGES})[0])
    for each in found:
        np.testing.assert_allclose(each, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["auto", "bodies"])
def test_what_was_answered_before_changes_nothing(parts: Partition, form: str) -> None:
    """A runtime plans memory by the first batch of a size; routes differ in the next."""
    batches = [IMAGES, IMAGES[::-1].copy(), 1 - IMAGES, IMAGES]
    grouped = graph_from_plan(parts.plan, parts.graphs)
    with OrtEngine(grouped.SerializeToString(), threads=1, custom_ops=form) as engine:
        found = [engine.run({"images": batch})["logits"] for batch in batches]
    alone = []
    for batch in batches:
        with OrtEngine(grouped.SerializeToString(), threads=1, custom_ops=form) as engine:
            alone.append(engine.run({"images": batch})["logits"])
    np.testing.assert_array_equal(found, alone)


def test_experts_of_convolutions_stay_in_their_branches() -> None:
    parts = parts_of(TINY)
    assert not are_groupable([parts.graphs[f"router.expert-{expert}"] for expert in range(2)])
    assert count(graph_from_plan(parts.plan, parts.graphs), "If") == 2


def another_constant(graph: ModelProto) -> None:
    (half,) = (t for t in graph.graph.initializer if t.name.endswith("half.number"))
    half.CopyFrom(numpy_helper.from_array(np.array(0.25, np.float32), half.name))


def another_operator(graph: ModelProto) -> None:
    next(node for node in graph.graph.node if node.op_type == "Erf").op_type = "Tanh"


def another_width(graph: ModelProto) -> None:
    for tensor in graph.graph.initializer:
        if tensor.name in ("fc1.weight", "fc1.bias", "fc2.weight"):
            axis = 1 if tensor.name == "fc2.weight" else 0
            values = numpy_helper.to_array(tensor).take(range(4), axis)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def scaled(graph: ModelProto) -> None:
    graph.graph.node[0].attribute.append(helper.make_attribute("alpha", 2.0))


def across_values(graph: ModelProto) -> None:
    last = graph.graph.node[-1]
    softmax = helper.make_node("Softmax", [last.input[0]], ["shares"], "shares", axis=1)
    last.input[0] = "shares"
    graph.graph.node.insert(len(graph.graph.node) - 1, softmax)


@pytest.mark.parametrize("change", [another_constant, another_operator, another_width])
@pytest.mark.parametrize("expert", [0, 2])
def test_experts_that_differ_stay_in_their_branches(
    parts: Partition, change: Callable[[ModelProto], None], expert: int
) -> None:
    assert are_groupable(experts_of(parts))
    change(experts_of(parts)[expert])
    assert not are_groupable(experts_of(parts))
    graph = graph_from_plan(parts.plan, parts.graphs)
    assert (count(graph, "If"), count(graph, "ExpertLinear")) == (3, 2)
    np.testing.assert_allclose(
        logits(graph), logits(graph_from_plan(parts.plan, parts.graphs, "if")), rtol=0, atol=1e-5
    )


def shared_weight(graph: ModelProto) -> None:
    first = graph.graph.node[0]
    again = helper.make_node("Gemm", first.input, ["again"], "again", transB=1)
    both = helper.make_node("Add", ["again", graph.graph.node[-1].input[0]], ["both"], "both")
    graph.graph.node[-1].input[0] = "both"
    for node in (both, again):
        graph.graph.node.insert(1 if node is again else len(graph.graph.node) - 1, node)


def wide_bias(graph: ModelProto) -> None:
    (bias,) = (t for t in graph.graph.initializer if t.name == "fc1.bias")
    bias.dims.insert(0, 1)


@pytest.mark.parametrize("change", [scaled, across_values, shared_weight, wide_bias])
def test_what_is_no_chain_of_linear_layers_stays(
    parts: Partition, change: Callable[[ModelProto], None]
) -> None:
    for graph in experts_of(parts):
        change(graph)
    assert not are_groupable(experts_of(parts))


def test_linear_layers_may_lack_a_bias_or_be_stored_the_other_way(parts: Partition) -> None:
    for graph in experts_of(parts):
        first, *_, last = graph.graph.node
        first.input.pop()
        del last.attribute[:]
        (weight,) = (t for t in graph.graph.initializer if t.name == last.input[1])
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).T, weight.name))
        del graph.graph.initializer[[t.name for t in graph.graph.initializer].index("fc1.bias")]
    branches, grouped = (graph_from_plan(parts.plan, parts.graphs, form) for form in FORMS)
    assert count(grouped, "ExpertLinear") == 4
    np.testing.assert_allclose(logits(grouped), logits(branches), rtol=0, atol=1e-5)
    require_every_expert(parts.plan, grouped, parts.graphs)


@pytest.mark.parametrize("name", ["fc1.weight", "fc2.bias", "half.number"])
def test_a_constant_that_is_not_its_expert_s_is_found(parts: Partition, name: str) -> None:
    graph = graph_from_plan(parts.plan, parts.graphs)
    require_every_expert(parts.plan, graph, parts.graphs)
    (tensor,) = (t for t in graph.graph.initializer if t.name.startswith(LAYER) and name in t.name)
    values = numpy_helper.to_array(tensor).copy()
    values[(-1,) * values.ndim] += 1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(CheckFailedError, match=rf"lacks \S*{name} of {LAYER}\.expert-\d"):
        require_every_expert(parts.plan, graph, parts.graphs)


@pytest.mark.skipif(KERNELS.library is None, reason=KERNELS.reason)
def test_elementwise_operators_between_the_layers_are_fused(
    parts: Partition, tmp_path: Path
) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.register_custom_ops_library(str(KERNELS.library))
    model = graph_from_plan(parts.plan, parts.graphs).SerializeToString()
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    optimised = onnx.load_model(tmp_path / "optimised.onnx")
    assert count(optimised, "Gelu") == 2
    assert count(optimised, "Erf") == 0

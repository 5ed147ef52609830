"""Kernels, bodies and ONNX's own evaluator answer what NumPy answers, whatever the shape."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from advmoe_deploy.export.graph.op_bodies import (
    OPSET_VERSION,
    bodies,
    with_bodies,
    without_custom_ops,
)
from advmoe_deploy.export.graph.writer import IR_VERSION, OPSET
from advmoe_deploy.plan import RENORMALISER, RouteStep
from advmoe_deploy.runtime.onnxruntime.custom_ops import DOMAIN, find_custom_ops
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.routing import route
from advmoe_deploy.specs import Weighting

KERNELS = find_custom_ops("auto")
FORMS = ("bodies", "kernels") if KERNELS.library else ("bodies",)
needs_kernels = pytest.mark.skipif(KERNELS.library is None, reason=KERNELS.reason)

Arrays = dict[str, np.ndarray]
RANDOM = np.random.default_rng(0)
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
OUTPUTS = {
    "ids": "int64",
    "rows": "int64",
    "positions": "int64",
    "offsets": "int64",
    "busy": "bool",
}
WEIGHTINGS: dict[str, tuple[Weighting, tuple[int, ...]]] = {
    "Top1": ("one", (1,)),
    "TopKProbability": ("probability", (1, 2, 3)),
    "TopKRenormalised": ("renormalised", (1, 2, 3)),
}


def model_of(operator: str, inputs: Arrays, **attributes: Any) -> onnx.ModelProto:
    """Return a model of one custom operator for inputs of these ranks."""
    model = without_body(operator, inputs, **attributes)
    del model.opset_import[1:]
    with_bodies(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def without_body(operator: str, inputs: Arrays, **attributes: Any) -> onnx.ModelProto:
    """Return a model that only the kernels run; nobody has checked its shapes."""
    outputs = list(bodies()[operator].output)
    ranks = {"rows": 1, "offsets": 1, "busy": 1, "combined": next(iter(inputs.values())).ndim}
    graph = helper.make_graph(
        [helper.make_node(operator, list(inputs), outputs, domain=DOMAIN, **attributes)],
        operator,
        [declared(name, str(x.dtype), x.ndim) for name, x in inputs.items()],
        [declared(name, OUTPUTS.get(name, "float32"), ranks.get(name, 2)) for name in outputs],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def declared(name: str, dtype: str, rank: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TYPES[dtype], [None] * rank)


def answers(operator: str, inputs: Arrays, **attributes: Any) -> list[Arrays]:
    """Return what the body answers, in ONNX Runtime and in ONNX's evaluator, and the kernel."""
    model = model_of(operator, inputs, **attributes)
    names = list(bodies()[operator].output)
    values = ReferenceEvaluator(model).run(names, inputs)
    evaluated = dict(zip(names, values, strict=True))
    return [evaluated, *(run(model, inputs, form) for form in FORMS)]


def run(model: onnx.ModelProto, inputs: Arrays, form: str) -> Arrays:
    """Return what ONNX Runtime answers with one form of the operators."""
    with OrtEngine(model.SerializeToString(), threads=1, custom_ops=form) as engine:
        assert engine.custom_ops is not None
        assert engine.custom_ops.form == form
        return engine.run(inputs)


def require(answer: Arrays, expected: Arrays) -> None:
    """Check names, types, shapes and values."""
    assert answer.keys() >= expected.keys()
    for name, values in expected.items():
        assert answer[name].dtype == values.dtype, name
        assert answer[name].shape == values.shape, name
        if values.dtype == np.float32:
            np.testing.assert_allclose(answer[name], values, rtol=2e-6, atol=2e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(answer[name], values, err_msg=name)


def by_hand(weighting: Weighting, scores_RE: np.ndarray, top_k: int) -> Arrays:
    """Return what the plan's runner makes of the scores, in NumPy."""
    step = RouteStep(
        layer="r", scores="s", num_experts=scores_RE.shape[1], top_k=top_k, weighting=weighting
    )
    made = route(step, scores_RE)
    return {"ids": made["r.expert_ids"], "weights": made["r.weights"]}


def attributes_for(weighting: Weighting, top_k: int) -> dict[str, Any]:
    if weighting == "one":
        return {}
    return {"k": top_k} if weighting == "probability" else {"k": top_k, "epsilon": RENORMALISER}


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_choosing_from_scores(name: str, rows: int) -> None:
    weighting, counts = WEIGHTINGS[name]
    scores_RE = RANDOM.normal(size=(rows, 5)).astype(np.float32)
    scores_RE[1:3] = [1, 2, 2, 1, 2]  # ties: the lowest index first
    for top_k in counts:
        expected = by_hand(weighting, scores_RE, top_k)
        found = answers(f"Router{name}", {"scores": scores_RE}, **attributes_for(weighting, top_k))
        for answer in found:
            require(answer, expected)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_one_expert(name: str) -> None:
    weighting, _ = WEIGHTINGS[name]
    scores_RE = np.array([[3.0], [-200.0]], np.float32)
    expected = by_hand(weighting, scores_RE, 1)
    for answer in answers(f"Router{name}", {"scores": scores_RE}, **attributes_for(weighting, 1)):
        require(answer, expected)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize(("channels", "size"), [(3, (2, 2)), (64, (8, 8)), (300, (7, 5))])
def test_gates_from_features(name: str, rows: int, channels: int, size: tuple[int, int]) -> None:
    weighting, (*_, top_k) = WEIGHTINGS[name]
    x_NCHW = RANDOM.normal(size=(rows, channels, *size)).astype(np.float32)
    weight_EC = RANDOM.normal(size=(4, channels)).astype(np.float32)
    bias_E = RANDOM.normal(size=4).astype(np.float32)
    for source, x in (("PoolLinear", x_NCHW), ("Linear", x_NCHW.mean((2, 3)))):
        inputs = {"x": x, "weight": weight_EC, "bias": bias_E}
        attributes = attributes_for(weighting, top_k)
        for answer in answers(f"{source}Router{name}", inputs, **attributes):
            rows_RC = x.reshape(rows, channels, size[0] * size[1] if x.ndim > 2 else 1)
            exact_RE = rows_RC.mean(2, dtype=np.float64) @ weight_EC.T.astype(np.float64) + bias_E
            np.testing.assert_allclose(answer["scores"], exact_RE, rtol=0, atol=2e-5)
            require(answer, by_hand(weighting, answer["scores"], top_k))


@needs_kernels
def test_nan_comes_first_in_the_kernel_as_in_torch() -> None:
    scores_RE = np.array([[0, np.nan, 9, np.nan], [np.inf, 1, -np.inf, 2]], np.float32)
    model = model_of("RouterTopKProbability", {"scores": scores_RE}, k=3)
    kernel = run(model, {"scores": scores_RE}, "kernels")
    np.testing.assert_array_equal(kernel["ids"], [[1, 3, 2], [0, 3, 1]])
    assert np.isnan(kernel["weights"]).all()  # a softmax of NaN, of infinity less infinity
    for form in FORMS:
        answer = run(model_of("RouterTop1", {"scores": scores_RE}), {"scores": scores_RE}, form)
        assert ((answer["ids"] >= 0) & (answer["ids"] < 4)).all()


@needs_kernels
def test_weights_are_exact_over_the_whole_range() -> None:
    scores_RE = np.stack([np.zeros(400), np.linspace(0, -120, 400)], axis=1).astype(np.float32)
    exact_RE = np.exp(scores_RE.astype(np.float64))
    exact_RE /= exact_RE.sum(axis=1, keepdims=True)
    model = model_of("RouterTopKProbability", {"scores": scores_RE}, k=2)
    kernel = run(model, {"scores": scores_RE}, "kernels")
    smallest = np.finfo(np.float32).tiny  # sessions take what is less, denormals, for zero
    exact_RE[exact_RE < smallest] = 0
    np.testing.assert_allclose(kernel["weights"], exact_RE, rtol=1.2e-7, atol=1e-44)


@pytest.mark.parametrize("experts", [1, 2, 6])
@pytest.mark.parametrize("shape", [(0, 1), (0, 2), (1, 1), (9, 1), (4, 3)])
def test_dispatch_sorts_choices_by_expert(shape: tuple[int, int], experts: int) -> None:
    ids_RK = RANDOM.integers(0, experts, shape)
    ids_S, choices = ids_RK.reshape(-1), np.arange(ids_RK.size)
    order_S = np.argsort(ids_S, kind="stable")
    position_S = np.empty_like(choices)
    position_S[order_S] = choices
    load_E = np.bincount(ids_S, minlength=experts)
    expected = {
        "rows": order_S // shape[1],
        "positions": position_S.reshape(shape),
        "offsets": np.concatenate([[0], np.cumsum(load_E)]),
        "busy": load_E > 0,
    }
    for answer in answers("ExpertDispatch", {"ids": ids_RK}, num_experts=experts):
        require(answer, expected)


@pytest.mark.parametrize("rest", [(), (10,), (3, 4, 5)])
@pytest.mark.parametrize("shape", [(0, 1), (1, 1), (5, 1), (0, 2), (4, 3)])
def test_combine_brings_answers_back(shape: tuple[int, int], rest: tuple[int, ...]) -> None:
    count = shape[0] * shape[1]
    grouped = RANDOM.normal(size=(count, *rest)).astype(np.float32)
    positions_RK = RANDOM.permutation(count).reshape(shape)
    weights_RK = RANDOM.random(shape, np.float32)
    each = grouped[positions_RK]
    weighted = (each * weights_RK.reshape(*shape, *([1] * len(rest)))).sum(axis=1)
    inputs = {"grouped": grouped, "positions": positions_RK, "weights": weights_RK}
    for answer in answers("ExpertWeightedCombine", inputs):
        require(answer, {"combined": weighted})
    if shape[1] == 1:
        del inputs["weights"]
        for answer in answers("ExpertCombine", inputs):
            require(answer, {"combined": each[:, 0]})


@needs_kernels
@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "message"),
    [
        ("RouterTopKProbability", {"scores": (2, 3)}, {"k": 4}, "k must lie between 1 and"),
        ("RouterTop1", {"scores": (2,)}, {}, "two dimensions"),
        ("LinearRouterTop1", {"x": (2, 3), "weight": (2, 4), "bias": (2,)}, {}, "differ in chan"),
        ("LinearRouterTop1", {"x": (2, 3), "weight": (2, 3), "bias": (3,)}, {}, "bias"),
        ("PoolLinearRouterTop1", {"x": (2, 3), "weight": (2, 3), "bias": (2,)}, {}, "feature map"),
    ],
)
def test_a_kernel_refuses_shapes_that_do_not_fit(
    operator: str, inputs: dict[str, tuple[int, ...]], attributes: dict[str, Any], message: str
) -> None:
    values = {name: np.zeros(shape, np.float32) for name, shape in inputs.items()}
    model = without_body(operator, values, **attributes).SerializeToString()
    with (
        OrtEngine(model, threads=1, custom_ops="kernels") as engine,
        pytest.raises(Exception, match=message),
    ):
        engine.run(values)


@needs_kernels
@pytest.mark.parametrize(
    ("operator", "values", "attributes", "message"),
    [
        ("ExpertDispatch", {"ids": np.array([[0], [2]])}, {"num_experts": 2}, "not below num_exp"),
        ("ExpertDispatch", {"ids": np.array([[-1]])}, {"num_experts": 2}, "not below num_experts"),
        (
            "ExpertCombine",
            {"grouped": np.ones((2, 3)), "positions": np.array([[0], [2]])},
            {},
            "outs",
        ),
        (
            "ExpertCombine",
            {"grouped": np.ones((1, 3)), "positions": np.array([[0], [1]])},
            {},
            "many",
        ),
        (
            "ExpertCombine",
            {"grouped": np.ones((2, 3)), "positions": np.array([[0, 1]])},
            {},
            "K is 1",
        ),
    ],
)
def test_a_kernel_reads_nothing_outside(
    operator: str, values: Arrays, attributes: dict[str, Any], message: str
) -> None:
    values = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in values.items()}
    model = without_body(operator, values, **attributes).SerializeToString()
    with (
        OrtEngine(model, threads=1, custom_ops="kernels") as engine,
        pytest.raises(Exception, match=message),
    ):
        engine.run(values)


@needs_kernels
def test_many_threads_share_one_engine() -> None:
    scores = [RANDOM.normal(size=(n, 6)).astype(np.float32) for n in range(1, 33)]
    model = model_of("RouterTopKRenormalised", {"scores": scores[0]}, k=2, epsilon=RENORMALISER)
    with OrtEngine(model.SerializeToString(), custom_ops="kernels") as engine:
        alone = [engine.run({"scores": each}) for each in scores]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda each: engine.run({"scores": each}), scores))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a["ids"], b["ids"])
        np.testing.assert_array_equal(a["weights"], b["weights"])


@needs_kernels
def test_sessions_are_made_by_many_threads_at_once() -> None:
    scores_RE = RANDOM.normal(size=(3, 4)).astype(np.float32)
    model = model_of("RouterTop1", {"scores": scores_RE}).SerializeToString()

    def ids_of(_: int) -> np.ndarray:
        with OrtEngine(model, threads=1, custom_ops="kernels") as engine:
            return engine.run({"scores": scores_RE})["ids"]

    with ThreadPoolExecutor(4) as pool:
        for ids in pool.map(ids_of, range(16)):
            np.testing.assert_array_equal(ids[:, 0], scores_RE.argmax(axis=1))


def test_bodies_can_take_the_operators_place() -> None:
    scores_RE = RANDOM.normal(size=(3, 4)).astype(np.float32)
    plain = without_custom_ops(model_of("RouterTopKProbability", {"scores": scores_RE}, k=2))
    assert not plain.functions
    assert [(entry.domain, entry.version) for entry in plain.opset_import] == [("", OPSET)]
    assert {node.domain for node in plain.graph.node} == {""}
    with OrtEngine(plain.SerializeToString()) as engine:
        assert engine.custom_ops is None
        require(engine.run({"scores": scores_RE}), by_hand("probability", scores_RE, 2))

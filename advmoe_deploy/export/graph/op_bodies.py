"""Bodies of the custom operators in standard operators, for runtimes without our kernels.

A body cannot choose operators by a string, nor have a varying number of outputs: so one name per
kind of input and of weight, and offsets instead of one list of rows per expert.

Shapes: N images, C channels, R rows (images or tokens), E experts, K experts per row,
S = R * K choices.
"""

from collections.abc import Iterable
from functools import cache

import onnx
from onnx import FunctionProto, ModelProto, helper, inliner

from advmoe_deploy.export.graph.writer import OPSET
from advmoe_deploy.runtime.onnxruntime.custom_ops import DOMAIN

OPSET_VERSION = 1

# From what a router is given to its scores, and from scores to ids and weights.
_SCORES = {
    "": "",
    "Linear": "scores = Gemm <transB = 1> (x, weight, bias)",
    "PoolLinear": """
        row = ReduceMean <axes = [2, 3], keepdims = 0> (x)
        scores = Gemm <transB = 1> (row, weight, bias)
    """,
}
_SHARES = """
    count = Constant <value_int: int = @k> ()
    zeros = Constant <value_ints: ints = [0]> ()
    top_k = Unsqueeze (count, zeros)
    best, ids = TopK <axis = 1, sorted = 1> (scores, top_k)
    shares = Softmax <axis = 1> (scores)
"""
_WEIGHTS = {
    "Top1": """
        ids = ArgMax <axis = 1, keepdims = 1, select_last_index = 0> (scores)
        shape = Shape (ids)
        weights = ConstantOfShape <value = float[1] {1.0}> (shape)
    """,
    "TopKProbability": f"""
        {_SHARES}
        weights = GatherElements <axis = 1> (shares, ids)
    """,
    "TopKRenormalised": f"""
        {_SHARES}
        chosen = GatherElements <axis = 1> (shares, ids)
        axis = Constant <value_ints: ints = [1]> ()
        total = ReduceSum <keepdims = 1> (chosen, axis)
        little = Constant <value_float: float = @epsilon> ()
        divisor = Add (total, little)
        weights = Div (chosen, divisor)
    """,
}
_ATTRIBUTES = {"Top1": "", "TopKProbability": "<k>", "TopKRenormalised": "<k, epsilon>"}

ROUTERS = tuple(f"Router{weighting}" for weighting in _WEIGHTS)
FUSED_ROUTERS = tuple(f"{source}{name}" for source in _SCORES if source for name in ROUTERS)

_DISPATCH = """
    ExpertDispatch <num_experts> (ids) => (rows, positions, offsets, busy) {
        zero = Constant <value_int: int = 0> ()
        one = Constant <value_int: int = 1> ()
        zeros = Constant <value_ints: ints = [0]> ()
        ones = Constant <value_ints: ints = [1]> ()
        flat = Constant <value_ints: ints = [-1]> ()
        experts = Constant <value_int: int = @num_experts> ()
        ids_S = Reshape (ids, flat)
        number_E = Range (zero, experts, one)
        number_E1 = Unsqueeze (number_E, ones)
        chosen_ES = Equal (number_E1, ids_S)
        found = NonZero (chosen_ES)
        order_S = Gather <axis = 0> (found, one)
        top_k = Shape <start = 1, end = 2> (ids)
        rows = Div (order_S, top_k)
        choices = Size (ids)
        number_S = Range (zero, choices, one)
        order_S1 = Unsqueeze (order_S, ones)
        position_S = ScatterND (number_S, order_S1, number_S)
        shape = Shape (ids)
        positions = Reshape (position_S, shape)
        counted_ES = Cast <to = 7> (chosen_ES)
        load_E = ReduceSum <keepdims = 0> (counted_ES, ones)
        ends_E = CumSum (load_E, zero)
        offsets = Concat <axis = 0> (zeros, ends_E)
        busy = Greater (load_E, zero)
    }
"""
# Answers are concatenated as they come. Collected in a sequence and concatenated at the end, they
# made ONNX Runtime 1.18 lose rows from the second batch of a size on: it plans memory by the first.
_LINEAR = """
    ExpertLinear (x, offsets, weight, bias) => (y) {
        one = Constant <value_int: int = 1> ()
        first = Constant <value_ints: ints = [0]> ()
        ends = Size (offsets)
        experts = Sub (ends, one)
        go = Constant <value = bool {1}> ()
        rows_0D = Slice (x, first, first)
        weight_1DH = Gather <axis = 0> (weight, first)
        first_weight_DH = Squeeze (weight_1DH, first)
        answers_0H = MatMul (rows_0D, first_weight_DH)
        y = Loop (experts, go, answers_0H) <body = linear_of_expert
            (int64 expert, bool before, float[R, H] answers_before)
            => (bool after, float[Q, H] answers_after)
        {
            zeros = Constant <value_ints: ints = [0]> ()
            begin_at = Unsqueeze (expert, zeros)
            end_at = Add (begin_at, one)
            begin = Gather <axis = 0> (offsets, begin_at)
            end = Gather <axis = 0> (offsets, end_at)
            rows = Slice (x, begin, end)
            weight_DH = Gather <axis = 0> (weight, expert)
            bias_H = Gather <axis = 0> (bias, expert)
            products = MatMul (rows, weight_DH)
            answer = Add (products, bias_H)
            answers_after = Concat <axis = 0> (answers_before, answer)
            after = Identity (before)
        }>
    }
"""
_COMBINE = """
    ExpertCombine (grouped, positions) => (combined) {
        axis = Constant <value_ints: ints = [1]> ()
        position_R = Squeeze (positions, axis)
        combined = Gather <axis = 0> (grouped, position_R)
    }
"""
_WEIGHTED_COMBINE = """
    ExpertWeightedCombine (grouped, positions, weights) => (combined) {
        answers = Gather <axis = 0> (grouped, positions)
        shape = Shape (weights)
        rest = Shape <start = 2> (answers)
        rank = Shape (rest)
        ones = ConstantOfShape <value = int64[1] {1}> (rank)
        beside = Concat <axis = 0> (shape, ones)
        weights_beside = Reshape (weights, beside)
        weighted = Mul (answers, weights_beside)
        axis = Constant <value_ints: ints = [1]> ()
        combined = ReduceSum <keepdims = 0> (weighted, axis)
    }
"""


def with_bodies(model: ModelProto) -> ModelProto:
    """Return ``model`` itself, given the bodies of the custom operators it uses and no other."""
    used = {node.op_type for node in nodes_of(model.graph) if node.domain == DOMAIN}
    del model.functions[:]
    model.functions.extend(body for name, body in bodies().items() if name in used)
    if used and all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, OPSET_VERSION))
    return model


def without_custom_ops(model: ModelProto) -> ModelProto:
    """Return ``model`` with every custom operator replaced by its body."""
    inlined = inliner.inline_local_functions(with_bodies(model))
    kept = [entry for entry in inlined.opset_import if entry.domain != DOMAIN]
    del inlined.opset_import[:]
    inlined.opset_import.extend(kept)
    return inlined


@cache
def bodies() -> dict[str, FunctionProto]:
    """Return every custom operator's body by the operator's name."""
    texts = [*_routers(), _DISPATCH, _LINEAR, _COMBINE, _WEIGHTED_COMBINE]
    header = f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">'
    functions = [onnx.parser.parse_function(header + text) for text in texts]
    return {function.name: function for function in functions}


def _routers() -> Iterable[str]:
    for source, scores in _SCORES.items():
        given, made = ("x, weight, bias", ", scores") if source else ("scores", "")
        for weighting, weights in _WEIGHTS.items():
            name, attributes = f"{source}Router{weighting}", _ATTRIBUTES[weighting]
            yield f"{name} {attributes} ({given}) => (ids, weights{made}) {{ {scores} {weights} }}"


def nodes_of(graph: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    """Yield the nodes of ``graph``, and those of the branches and bodies in them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)

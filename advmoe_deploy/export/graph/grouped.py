"""Experts of linear layers, all in one: a layer of every expert is one node over all rows.

Where every expert is the same chain of linear layers with constants of its own and of elementwise
operators with constants that all share, as the experts of a vision transformer are, the chain is
written once, for the rows of all experts. Few rows then cost what reading the weights costs, not a
sub-graph and a small product per expert. Elementwise operators stay as they are: runtimes fuse
them.

Shapes: S rows, sorted by expert; E experts; D values in, H values out.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from onnx import numpy_helper as onnx_numpy

from advmoe_deploy.export.graph.writer import GraphWriter, attributes_of
from advmoe_deploy.plan import TensorInfo

_ELEMENTWISE = frozenset(
    ("Abs", "Add", "Clip", "Div", "Erf", "Exp", "Max", "Min", "Mul", "Neg", "Pow", "Relu")
) | frozenset(("Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh"))
_PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0}

Constants = dict[str, NDArray[Any]]


def are_groupable(graphs: Sequence[ModelProto]) -> bool:
    """Return whether the experts ``graphs`` are one chain of linear layers and shared operators."""
    first, *others = graphs
    constants = taken_constants(first)
    own = [name for node in first.graph.node if _is_linear(node) for name in node.input[1:]]
    read = Counter(name for node in first.graph.node for name in node.input)
    shared = {name: values for name, values in constants.items() if name not in own}
    return (
        bool(own)
        and all(read[name] == 1 for name in own)
        and all(_is_taken(node, constants) for node in first.graph.node)
        and all(_has_same_nodes(first, other) for other in others)
        and all(_holds(taken_constants(other), shared, constants) for other in others)
    )


def taken_constants(graph: ModelProto) -> Constants:
    """Return an expert's constants as its layers take them: weights as [D, H]."""
    constants = {t.name: onnx_numpy.to_array(t) for t in graph.graph.initializer}
    for node in graph.graph.node:
        if _is_linear(node) and attributes_of(node).get("transB", 0):
            constants[node.input[1]] = constants[node.input[1]].T
    return constants


def name_in_layer(layer: str, name: str) -> str:
    """Return what ``name`` of an expert of ``layer`` is called where all experts are one."""
    return f"{layer}.experts/{name}"


def write_grouped(
    writer: GraphWriter, layer: str, graphs: Sequence[ModelProto], rows: str, offsets: str
) -> str:
    """Add the experts ``graphs`` of ``layer`` on ``rows`` [S, D]; return their answers' name.

    ``offsets`` [E+1] says where each expert's rows begin.
    """
    taken, (first, *_) = [taken_constants(graph) for graph in graphs], graphs
    names = {first.graph.input[0].name: rows}
    for node in first.graph.node:
        output = names[node.output[0]] = name_in_layer(layer, node.output[0])
        if _is_linear(node):
            x, *parameters = node.input
            given = [names[x], offsets, *_write_parameters(writer, layer, parameters, taken)]
            writer.emit_custom("ExpertLinear", given, [output])
            width = taken[0][parameters[0]].shape[1]
            shape = (f"choices of {layer}", width)
            writer.inner.append(TensorInfo(name=output, dtype="float32", shape=shape))
            continue
        given = [
            names.get(name) or writer.constant(name_in_layer(layer, name), taken[0][name])
            for name in node.input
        ]
        writer.emit(node.op_type, given, output, **attributes_of(node))
    return names[first.graph.output[0].name]


def _write_parameters(
    writer: GraphWriter, layer: str, parameters: Sequence[str], taken: Sequence[Constants]
) -> tuple[str, str]:
    """Add weight [E, D, H] and bias [E, H] of a linear layer, zeros if it has no bias."""
    weight, *bias = parameters
    weights = np.stack([constants[weight] for constants in taken])
    biases = (
        np.stack([constants[bias[0]] for constants in taken])
        if bias
        else np.zeros(weights.shape[::2], np.float32)
    )
    of_bias = bias[0] if bias else f"no bias of {weight}"
    return (
        writer.constant(name_in_layer(layer, weight), weights),
        writer.constant(name_in_layer(layer, of_bias), biases),
    )


def _is_linear(node: NodeProto) -> bool:
    return bool(node.op_type == "Gemm")


def _is_taken(node: NodeProto, constants: Constants) -> bool:
    if not _is_linear(node):
        return node.op_type in _ELEMENTWISE and not node.domain
    attributes = {**_PLAIN, **attributes_of(node)}
    attributes.pop("transB", None)
    x, *parameters = node.input
    if attributes != _PLAIN or x in constants or not constants.keys() >= {*parameters}:
        return False
    weight, *bias = (constants[name] for name in parameters)
    of_float = all(values.dtype == np.float32 for values in (weight, *bias))
    return of_float and all(values.shape == weight.shape[1:] for values in bias)


def _has_same_nodes(first: ModelProto, other: ModelProto) -> bool:
    ends = [first.graph.input, first.graph.output], [other.graph.input, other.graph.output]
    same = [[[t.name for t in end] for end in graph] for graph in ends]
    return same[0] == same[1] and list(first.graph.node) == list(other.graph.node)


def _holds(constants: Constants, shared: Constants, like: Constants) -> bool:
    """Return whether ``constants`` are ``shared`` where these are, and shaped as ``like``."""
    return (
        constants.keys() == like.keys()
        and all(constants[name].shape == like[name].shape for name in like)
        and all(constants[name].dtype == like[name].dtype for name in like)
        and all(np.array_equal(constants[name], values) for name, values in shared.items())
    )

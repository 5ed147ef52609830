"""Casts in graphs, which say their precision themselves, as TensorRT wants it.

Standard operators only, no functions, opset 17, and more where that says too little: bfloat16 may
be convolved from opset 22 on, and Q/DQ pairs may be of float16 from 19 on. Tensors between
graphs stay float32, ids are int64.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, version_converter
from onnx import numpy_helper as onnx_numpy

from advmoe_deploy.export.graph.writer import constants_of, consumers_of
from advmoe_deploy.plan import RouteStep
from advmoe_deploy.specs import ComputeDtype, Precision

_TYPES: dict[Precision, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# Opsets from which on Conv takes bfloat16 and Q/DQ pairs are of float16, and the IR versions that
# came with them.
_BF16_OPSET, _BF16_IR = 22, 10
_FP16_QDQ_OPSET, _FP16_QDQ_IR = 19, 9
_LARGEST_FP16 = float(np.finfo(np.float16).max)
_LEAST_FP16 = np.finfo(np.float16).smallest_subnormal
_QDQ = ("QuantizeLinear", "DequantizeLinear")


def fits_fp16(graph: ModelProto) -> bool:
    """Return whether float16 holds every constant of ``graph``."""
    values = (v for v in constants_of(graph).values() if v.dtype == np.float32)
    return all(not value.size or np.abs(value).max() <= _LARGEST_FP16 for value in values)


def lowered(
    graph: ModelProto, compute_dtype: ComputeDtype, routes: Sequence[RouteStep]
) -> ModelProto:
    """Return ``graph`` in ``compute_dtype``, but for what makes scores after the last convolution.

    Inputs and outputs stay what they are.
    """
    if compute_dtype == "fp32":
        return graph
    result = _Lowering(graph, _TYPES[compute_dtype], _exact(graph, routes)).result()
    if compute_dtype == "bf16":
        return _raised(result, _BF16_OPSET, _BF16_IR)
    is_quantised = any(node.op_type in _QDQ for node in graph.graph.node)
    return _raised(result, _FP16_QDQ_OPSET, _FP16_QDQ_IR) if is_quantised else result


def _raised(graph: ModelProto, opset: int, ir_version: int) -> ModelProto:
    result = version_converter.convert_version(graph, opset)
    del result.graph.value_info[:]  # inferred by the rules of the old opset
    result.ir_version = ir_version
    return result


def _exact(graph: ModelProto, routes: Iterable[RouteStep]) -> set[str]:
    """Return the values that lead to ids and weights alone, back to the last convolution."""
    exact = {name for route in routes for name in (route.expert_ids, route.weights)}
    ends = {tensor.name for tensor in graph.graph.output} - exact
    readers = consumers_of(graph)
    for node in reversed(graph.graph.node):
        behind = [reader for name in node.output for reader in readers.get(name, [])]
        only = all(exact.issuperset(reader.output) for reader in behind)
        if behind and only and node.op_type != "Conv" and ends.isdisjoint(node.output):
            exact.update(node.output)
    return exact


class _Lowering:
    """Rewrites a graph, with casts where float32 and the lower type meet."""

    def __init__(self, graph: ModelProto, type_: int, exact: set[str]) -> None:
        self.model, self.type, self.exact = graph, type_, exact
        inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True).graph
        infos = [*inferred.value_info, *inferred.input, *inferred.output]
        floats = {i.name for i in infos if i.type.tensor_type.elem_type == TensorProto.FLOAT}
        self.constants = {t.name: t for t in graph.graph.initializer}
        self.floats = floats | {n for n, t in self.constants.items() if t.data_type == 1}
        self.scales = {n.input[1] for n in graph.graph.node if n.op_type in _QDQ}
        self.outputs = {tensor.name for tensor in graph.graph.output}
        self.nodes: list[NodeProto] = []
        self.kept: dict[str, TensorProto] = {}
        # What a float is called in float32, and in the lower type.
        self.full = {tensor.name: tensor.name for tensor in graph.graph.input}
        self.low: dict[str, str] = {}

    def result(self) -> ModelProto:
        """Return the graph that was rewritten."""
        for node in self.model.graph.node:
            exact = self.exact.issuperset(node.output)
            clone = NodeProto()
            clone.CopyFrom(node)
            clone.input[:] = [self._as(name, exact) for name in node.input]
            clone.output[:] = [self._made(name, exact) for name in node.output]
            self.nodes.append(clone)
            for name in self.outputs.intersection(node.output):
                self._as(name, True)
        result = ModelProto()
        result.CopyFrom(self.model)
        del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:]
        result.graph.node.extend(self.nodes)
        result.graph.initializer.extend(self.kept.values())
        return result

    def _made(self, name: str, exact: bool) -> str:
        if name not in self.floats:
            return name
        if exact:
            self.full[name] = name
            return name
        self.low[name] = f"{name}.low"
        return self.low[name]

    def _as(self, name: str, exact: bool) -> str:
        """Return what ``name`` is called in the type that is wanted; adds a cast where needed."""
        if name in self.constants:
            return self._constant(name, exact)
        if name not in self.floats:
            return name
        known, other = (self.full, self.low) if exact else (self.low, self.full)
        if name not in known:
            known[name] = name if exact else f"{name}.low"
            to = TensorProto.FLOAT if exact else self.type
            title = f"{known[name]}.cast"  # the node that makes the value may be called as it is
            self.nodes.append(helper.make_node("Cast", [other[name]], [known[name]], title, to=to))
        return known[name]

    def _constant(self, name: str, exact: bool) -> str:
        tensor = self.constants[name]
        if name not in self.floats or exact:
            self.kept[name] = tensor
            return name
        low = f"{name}.low"
        if low not in self.kept:
            values = onnx_numpy.to_array(tensor)
            if name in self.scales:  # of a channel that is next to nothing, and nothing divides
                values = np.maximum(values, np.float32(_LEAST_FP16))
            self.kept[low] = _rounded(values, low, self.type)
        return low


def _rounded(values: NDArray[np.float32], name: str, type_: int) -> TensorProto:
    if type_ == TensorProto.FLOAT16:
        return onnx_numpy.from_array(values.astype(np.float16), name)
    bits = np.ascontiguousarray(values).view(np.uint32)  # to the nearest, ties to even
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return TensorProto(name=name, data_type=type_, dims=values.shape, raw_data=rounded.tobytes())


def for_cpu(graph: ModelProto) -> ModelProto:
    """Return ``graph`` as ONNX Runtime runs it on a CPU: where bfloat16 is, between roundings.

    It has no kernels for bfloat16. Here every node computes in float32 and its results are rounded,
    which is what a GPU does, whose products are summed in float32.
    """
    if not any(t.data_type == TensorProto.BFLOAT16 for t in graph.graph.initializer):
        return graph
    result = ModelProto()
    result.CopyFrom(graph)
    low = {t.name for t in graph.graph.initializer if t.data_type == TensorProto.BFLOAT16}
    del result.graph.node[:]
    for node in graph.graph.node:
        result.graph.node.extend(_between_casts(node, low))
    return result


def _between_casts(node: NodeProto, low: set[str]) -> list[NodeProto]:
    if node.op_type == "Cast":
        to = {a.name: a.i for a in node.attribute}["to"]
        low.update(node.output if to == TensorProto.BFLOAT16 else ())
        return [node]
    given = [name for name in node.input if name in low]
    if not given:
        return [node]
    names: Mapping[str, str] = {name: f"{node.name}:{name}" for name in (*given, *node.output)}
    clone = NodeProto()
    clone.CopyFrom(node)
    clone.input[:] = [names.get(name, name) for name in node.input]
    clone.output[:] = [names[name] for name in node.output]
    low.update(node.output)
    before = [
        helper.make_node("Cast", [name], [names[name]], names[name], to=TensorProto.FLOAT)
        for name in dict.fromkeys(given)
    ]
    after = [
        helper.make_node("Cast", [names[name]], [name], name, to=TensorProto.BFLOAT16)
        for name in node.output
    ]
    return [*before, clone, *after]


def precision_of(graph: ModelProto) -> Precision:
    """Return the lowest precision that ``graph`` says."""
    if any(node.op_type == "QuantizeLinear" for node in graph.graph.node):
        return "int8"
    types = {tensor.data_type for tensor in graph.graph.initializer}
    found = [kind for kind, type_ in _TYPES.items() if type_ in types]
    return found[0] if found else "fp32"

"""Pass that fuses a gate's pooling and linear layer with the choice of the experts.

Contract: a router operator whose scores come from a ``Gemm`` of constants becomes one that takes
the rows the ``Gemm`` took, or, where these are the channel means of a feature map that nobody else
reads, the map. It answers scores, ids and weights; scores change by rounding only. Every other
router stays as it is, with a reason. The pass works on the whole graph, where gate and router meet.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from advmoe_deploy.export.graph.op_bodies import FUSED_ROUTERS, ROUTERS, with_bodies
from advmoe_deploy.export.graph.writer import GraphWriter, attributes_of, constants_of, consumers_of
from advmoe_deploy.export.partition.sample import Arrays
from advmoe_deploy.export.passes.report import PassReport, refused, too_far
from advmoe_deploy.plan import TensorInfo
from advmoe_deploy.runtime.onnxruntime.custom_ops import DOMAIN
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine

_NAME = "fuse_router"
_PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0}


@dataclass(frozen=True)
class _Tail:
    """Tail of a router: a linear layer, and the pooling before it or nothing."""

    gemm: NodeProto
    pooling: tuple[NodeProto, ...]

    @property
    def input(self) -> str:
        first = self.pooling[0] if self.pooling else self.gemm
        return str(first.input[0])


def fuse_router(model: ModelProto) -> PassReport:
    """Fuse in place; return how many routers were fused and why the others were not."""
    fused, declined = 0, []
    for node in [n for n in model.graph.node if n.domain == DOMAIN and n.op_type in ROUTERS]:
        tail = _tail(model, node)
        if isinstance(tail, str):
            declined.append(f"{node.name}: {tail}")
            continue
        _fuse(model, node, tail)
        fused += 1
    with_bodies(model)
    return PassReport(_NAME, fused, tuple(declined))


def fuse_router_checked(model: ModelProto, inputs: Arrays) -> PassReport:
    """Fuse in place; return what :func:`fuse_router` did.

    All of it is undone where a fused router, given what its gate was given, moves its scores away
    from the exact ones.
    """
    before = copy.deepcopy(model)
    report = fuse_router(model)
    if reasons := _moved_scores(before, model, inputs):
        model.CopyFrom(before)
        return refused(report, reasons)
    return report


def _moved_scores(before: ModelProto, fused: ModelProto, inputs: Arrays) -> dict[str, str]:
    """Return by name the routers of ``fused`` whose scores moved, and how far."""
    nodes = [n for n in fused.graph.node if n.domain == DOMAIN and n.op_type in FUSED_ROUTERS]
    names = (name for node in nodes for name in (node.input[0], node.output[2]))
    values = _values(copy.deepcopy(before), names, inputs)
    moved = {}
    for node in nodes:
        given, scores = node.input[0], node.output[2]
        after = _scores(fused, node, values[given])
        exact = _exact_scores(before, scores, values[given])
        if reason := too_far(scores, values[scores], after, exact):
            moved[node.name] = reason
    return moved


def _tail(model: ModelProto, router: NodeProto) -> _Tail | str:
    """Return the tail of the gate before ``router``, or why it cannot be fused."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    gemm = made_by.get(router.input[0])
    if gemm is None or gemm.op_type != "Gemm":
        return "its scores do not come from a linear layer"
    attributes = {**_PLAIN, "transB": 0, **attributes_of(gemm)}
    if attributes != {**_PLAIN, "transB": 1}:
        return "its linear layer is scaled or transposed"
    constants = {t.name: t for t in model.graph.initializer}
    for name in gemm.input[1:]:
        if name not in constants or constants[name].data_type != TensorProto.FLOAT:
            return "the parameters of its linear layer are not float32 constants"
    return _Tail(gemm, _pooling(model, made_by, gemm.input[0]))


def _pooling(
    model: ModelProto, made_by: Mapping[str, NodeProto], name: str
) -> tuple[NodeProto, ...]:
    """Return the nodes that make ``name`` the channel means of a map, if only for this reader."""
    readers = consumers_of(model)
    kept = {output.name for output in model.graph.output}
    last = made_by.get(name)
    if last is None or len(readers[name]) > 1 or name in kept:
        return ()
    if last.op_type == "ReduceMean" and len(last.input) == 1:
        means = attributes_of(last)
        plain = means.get("axes") == [2, 3] and not means.get("keepdims", 1)
        return (last,) if plain else ()
    first = made_by.get(last.input[0])
    if last.op_type != "Flatten" or attributes_of(last).get("axis", 1) != 1 or first is None:
        return ()
    alone = len(readers[last.input[0]]) == 1 and last.input[0] not in kept
    return (first, last) if first.op_type == "GlobalAveragePool" and alone else ()


def _fuse(model: ModelProto, router: NodeProto, tail: _Tail) -> None:
    gemm, graph = tail.gemm, model.graph
    weight, *bias = gemm.input[1:]
    if not bias:
        bias = [f"{router.name}/no_bias"]
        experts = next(t.dims[0] for t in graph.initializer if t.name == weight)
        zeros = helper.make_tensor(bias[0], TensorProto.FLOAT, [experts], [0.0] * experts)
        graph.initializer.append(zeros)
    given, scores = tail.input, gemm.output[0]
    fused = NodeProto()
    fused.CopyFrom(router)
    fused.op_type = f"{'Pool' if tail.pooling else ''}Linear{router.op_type}"
    fused.input[:] = [given, weight, *bias]
    fused.output[:] = [*router.output, scores]
    at = next(i for i, node in enumerate(graph.node) if node == gemm)
    graph.node.insert(at, fused)
    for node in (router, gemm, *tail.pooling):
        graph.node.remove(node)


def _values(model: ModelProto, names: Iterable[str], inputs: Arrays) -> Arrays:
    """Return inner values of ``model``, and its inputs; changes its outputs."""
    wanted = [name for name in dict.fromkeys(names) if name not in inputs]
    if not wanted:
        return inputs
    del model.graph.output[:]
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted
    )
    with OrtEngine(model.SerializeToString()) as engine:
        return {**inputs, **engine.run(inputs)}


def _scores(model: ModelProto, node: NodeProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the scores that the fused ``node`` of ``model`` makes of ``x``."""
    given, *parameters = node.input
    held = {t.name: t for t in model.graph.initializer}
    writer = GraphWriter()
    writer.nodes.append(node)
    writer.initializers = {name: held[name] for name in parameters}
    shape = (len(x), held[parameters[0]].dims[0])
    alone = writer.model(
        "router",
        [TensorInfo(name=given, dtype="float32", shape=x.shape)],
        [TensorInfo(name=node.output[2], dtype="float32", shape=shape)],
    )
    with OrtEngine(with_bodies(alone).SerializeToString()) as engine:
        return engine.run({given: x})[node.output[2]]


def _exact_scores(model: ModelProto, scores: str, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return in float64 what the linear layer of ``model`` that makes ``scores`` makes of ``x``."""
    (gemm,) = (node for node in model.graph.node if scores in node.output)
    constants = constants_of(model)
    weight_EC, *bias_E = (constants[name].astype(np.float64) for name in gemm.input[1:])
    rows_RC = x.astype(np.float64).mean(axis=tuple(range(2, x.ndim)))
    return sum(bias_E, rows_RC @ weight_EC.T)

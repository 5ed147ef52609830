"""Faults that are planted in the graph of an AdvMoE with two experts."""

from collections.abc import Callable

import numpy as np
from onnx import ModelProto, NodeProto, helper

from tests.verify.planted.graphs import (
    IDS,
    IMAGES,
    LOGITS,
    after,
    batch_size,
    before,
    constant,
    fill,
    graphs_of,
    values_of,
    weights_of,
)

node = helper.make_node


def scaled_logits(factor: float) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        constant(model, "factor", factor)
        after(model, LOGITS, [node("Mul", ["raw", "factor"], [LOGITS])])

    return edit


def seen(operator: str, *values: object) -> Callable[[ModelProto], None]:
    """Change images by an operator with constants before anything else sees them."""

    def edit(model: ModelProto) -> None:
        new = f"seen-{len(model.graph.node)}"
        names = [constant(model, f"{new}-{i}", value) for i, value in enumerate(values)]
        before(model, IMAGES, [node(operator, [IMAGES, *names], [new])], new)

    return edit


def transposed(model: ModelProto) -> None:
    before(model, IMAGES, [node("Transpose", [IMAGES], ["seen"], perm=[0, 1, 3, 2])], "seen")


def reversed_axis(axis: int, length: int) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        constant(model, "order", range(length)[::-1], np.int64)
        before(model, IMAGES, [node("Gather", [IMAGES, "order"], ["seen"], axis=axis)], "seen")

    return edit


def wrong_alone(model: ModelProto) -> None:
    """Of a single image, the logits change their sign."""
    nodes = [
        *batch_size(model),
        node("Equal", ["batch", "second"], ["alone"]),
        node("Neg", ["raw"], ["wrong"]),
        node("Where", ["alone", "wrong", "raw"], [LOGITS]),
    ]
    after(model, LOGITS, nodes)


def odd_batches_shifted(model: ModelProto) -> None:
    """Of an odd number of images, each gets the answer of the next."""
    constant(model, "two", [2], np.int64)
    constant(model, "zero", 0, np.int64)
    constant(model, "one", 1, np.int64)
    nodes = [
        *batch_size(model),
        node("Mod", ["batch", "two"], ["odd"]),
        node("Squeeze", ["batch"], ["count"]),
        node("Range", ["zero", "count", "one"], ["rows"]),
        node("Add", ["rows", "odd"], ["later"]),
        node("Mod", ["later", "batch"], ["taken"]),
        node("Gather", ["raw", "taken"], [LOGITS]),
    ]
    after(model, LOGITS, nodes)


def first_route_for_all(model: ModelProto) -> None:
    """The whole batch goes to the expert of its first image."""
    constant(model, "zero", [0], np.int64)
    nodes = [
        node("Gather", ["raw", "zero"], ["route"]),
        node("Shape", ["raw"], ["size"]),
        node("Expand", ["route", "size"], [IDS]),
    ]
    after(model, IDS, nodes)


def batch_statistics(gamma: np.ndarray, beta: np.ndarray) -> Callable[[ModelProto], None]:
    """BatchNorm behind the router's first convolution takes the statistics of the batch."""

    def edit(model: ModelProto) -> None:
        constant(model, "gamma", np.abs(gamma)[:, None, None])
        constant(model, "beta", beta[:, None, None])
        constant(model, "small", 1e-5)
        axes = {"axes": [0, 2, 3], "keepdims": 1}
        nodes = [
            node("ReduceMean", ["raw"], ["mean"], **axes),
            node("Sub", ["raw", "mean"], ["centred"]),
            node("Mul", ["centred", "centred"], ["squares"]),
            node("ReduceMean", ["squares"], ["variance"], **axes),
            node("Add", ["variance", "small"], ["positive"]),
            node("Sqrt", ["positive"], ["deviation"]),
            node("Div", ["centred", "deviation"], ["standard"]),
            node("Mul", ["standard", "gamma"], ["stretched"]),
            node("Add", ["stretched", "beta"], ["router/batch_norm_1"]),
        ]
        after(model, "router/batch_norm_1", nodes)

    return edit


def router_of_4_bits(model: ModelProto) -> None:
    for tensor in weights_of(model, "router/").values():
        values = values_of(tensor)
        if values.ndim > 1:
            step = np.abs(values).max() / 7
            fill(tensor, np.round(values / step) * step)


def experts_swapped(model: ModelProto) -> None:
    for name, tensor in weights_of(model, "router.expert-0/").items():
        other = weights_of(model, name.replace("expert-0", "expert-1"))
        (twin,) = (t for n, t in other.items() if n == name.replace("expert-0", "expert-1"))
        ours, theirs = values_of(tensor), values_of(twin)
        fill(tensor, theirs)
        fill(twin, ours)


def expert_lost(model: ModelProto) -> None:
    """Expert 1 has the weights of expert 0."""
    for name, tensor in weights_of(model, "router.expert-1/").items():
        fill(tensor, values_of(weights_of(model)[name.replace("expert-1", "expert-0")]))


def expert_zeroed(model: ModelProto) -> None:
    for name, tensor in weights_of(model, "router.expert-1/").items():
        fill(tensor, 0 * values_of(weights_of(model)[name]))


def classes_reversed(model: ModelProto) -> None:
    for name, tensor in weights_of(model).items():
        if "linear." in name:
            fill(tensor, values_of(tensor)[::-1])


def one_class_off(model: ModelProto) -> None:
    for name, tensor in weights_of(model).items():
        if name.endswith("linear.bias"):
            values = values_of(tensor)
            values[3] += 1
            fill(tensor, values)


def perturbed(share: float, prefix: str = "") -> Callable[[ModelProto], None]:
    """Every weight changes by about ``share`` of itself, as from an epoch to another."""

    def edit(model: ModelProto) -> None:
        draw = np.random.default_rng(0)
        for tensor in weights_of(model, prefix).values():
            values = values_of(tensor)
            fill(tensor, values * (1 + share * draw.standard_normal(values.shape)))

    return edit


def stale_statistics(prefix: str) -> Callable[[ModelProto], None]:
    """Folded BatchNorm had other variances and means: channels are stretched and moved."""

    def edit(model: ModelProto) -> None:
        draw = np.random.default_rng(0)
        tensors = weights_of(model, prefix)
        for name in [n for n in tensors if n.endswith(".bias") and "conv" in n]:
            stretch = 1 + 0.2 * draw.standard_normal(len(values_of(tensors[name])))
            weight = tensors[name.removesuffix("bias") + "weight"]
            fill(weight, values_of(weight) * stretch[:, None, None, None])
            moved = values_of(tensors[name]) * stretch + 0.05 * draw.standard_normal(len(stretch))
            fill(tensors[name], moved)

    return edit


def clipped_activations(prefix: str, limit: float) -> Callable[[ModelProto], None]:
    """What a quantiser does to bright images whose scales come from dark ones."""

    def edit(model: ModelProto) -> None:
        constant(model, "low", 0)
        constant(model, "high", limit)
        for name in _activations(model, prefix):
            after(model, name, [node("Clip", ["raw", "low", "high"], [name])])
            _rename_raw(model, name)

    return edit


def dark_scales(share: float) -> Callable[[ModelProto], None]:
    """The scales of quantised activations come from images of which all is darker."""

    def edit(model: ModelProto) -> None:
        for name, tensor in weights_of(model, "router.expert-").items():
            if name.endswith("_scale") and "weight" not in name and "bias" not in name:
                fill(tensor, share * values_of(tensor))

    return edit


def overflow(model: ModelProto) -> None:
    """The activations of expert 1 go through fp16, in which they are too large."""
    name = "router.expert-1/relu_1"
    constant(model, "large", 1e5)
    nodes = [
        node("Mul", ["raw", "large"], ["grown"]),
        node("Cast", ["grown"], ["half"], to=10),
        node("Cast", ["half"], ["single"], to=1),
        node("Div", ["single", "large"], [name]),
    ]
    after(model, name, nodes)


def last_of_equals(model: ModelProto) -> None:
    """The router takes the last of equal scores, by standard operators."""
    place = next(i for i, n in enumerate(model.graph.node) if n.op_type == "PoolLinearRouterTop1")
    fused = model.graph.node[place]
    x, weight, bias = fused.input
    ids, weights, scores = fused.output
    nodes = [
        node("ReduceMean", [x], ["row"], axes=[2, 3], keepdims=0),
        node("Gemm", ["row", weight, bias], [scores], transB=1),
        node("ArgMax", [scores], [ids], axis=1, keepdims=1, select_last_index=1),
        node("Cast", [ids], ["as-float"], to=1),
        node("Mul", ["as-float", constant(model, "nothing", 0)], ["zeros"]),
        node("Add", ["zeros", constant(model, "unit", 1)], [weights]),
    ]
    kept = [*model.graph.node[:place], *nodes, *model.graph.node[place + 1 :]]
    copies = [NodeProto.FromString(each.SerializeToString()) for each in kept]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _activations(model: ModelProto, prefix: str) -> list[str]:
    return [
        each.output[0]
        for graph in graphs_of(model.graph)
        for each in graph.node
        if each.op_type == "Relu" and each.output[0].startswith(prefix)
    ]


def _rename_raw(model: ModelProto, name: str) -> None:
    """Give the value that was ``name`` a name of its own, so that another can be ``raw``."""
    for graph in graphs_of(model.graph):
        for each in graph.node:
            for names in (each.input, each.output):
                for place, found in enumerate(names):
                    if found == "raw":
                        names[place] = f"{name}-raw"

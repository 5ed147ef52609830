"""ONNX operators for each torch operator that a segment may hold.

:mod:`~advmoe_deploy.export.partition.lowering` walks the graph and looks them up here.

The table is small on purpose: a segment is a dense graph without control flow, and a few dozen
operators say it. An operator is a function of the writer, the name of its result, and torch's own
arguments: tensors are names, and sizes that depend on the batch are ``None``, for the writer knows
the shape of every value.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from advmoe_deploy.export.partition.segment_writer import SegmentWriter, require

_END = np.iinfo(np.int64).max


def _conv2d(
    g: SegmentWriter,
    output: str,
    x: str,
    weight: str,
    bias: str | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> str:
    return g.emit(
        "Conv",
        [x, weight] if bias is None else [x, weight, bias],
        output,
        kernel_shape=list(g.shapes[weight][2:]),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )


def _batch_norm(
    g: SegmentWriter,
    output: str,
    x: str,
    weight: str,
    bias: str,
    mean: str,
    variance: str,
    training: bool,
    _momentum: float,
    epsilon: float,
    _cudnn: bool,
) -> str:
    require(not training, "a segment is exported in eval mode")
    return g.emit("BatchNormalization", [x, weight, bias, mean, variance], output, epsilon=epsilon)


def _layer_norm(
    g: SegmentWriter,
    output: str,
    x: str,
    size: Sequence[int],
    weight: str,
    bias: str,
    epsilon: float = 1e-5,
    _cudnn: bool = True,
) -> str:
    require(len(size) == 1, "only normalisation of the last axis is known")
    return g.emit("LayerNormalization", [x, weight, bias], output, axis=-1, epsilon=epsilon)


def _global_pool(g: SegmentWriter, output: str, x: str, size: list[int]) -> str:
    require(list(size) == [1, 1], "only global average pooling is known")
    return g.emit("GlobalAveragePool", [x], output)


def _max_pool(
    g: SegmentWriter,
    output: str,
    x: str,
    size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil: bool = False,
) -> str:
    require(not ceil, "pooling windows that stick out are not known")
    return g.emit(
        "MaxPool",
        [x],
        output,
        kernel_shape=_pair(size),
        strides=_pair(stride or size),
        pads=_pair(padding) * 2,
        dilations=_pair(dilation),
    )


def _avg_pool(
    g: SegmentWriter,
    output: str,
    x: str,
    size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil: bool = False,
    count_padding: bool = True,
    divisor: int | None = None,
) -> str:
    require(not ceil and divisor is None, "pooling windows that stick out are not known")
    return g.emit(
        "AveragePool",
        [x],
        output,
        kernel_shape=_pair(size),
        strides=_pair(stride or size),
        pads=_pair(padding) * 2,
        count_include_pad=int(count_padding),
    )


def _pair(sizes: Sequence[int]) -> list[int]:
    return list(sizes) * (2 // len(sizes))


def _mean(g: SegmentWriter, output: str, x: str, axes: Sequence[int], keepdim: bool = False) -> str:
    return g.emit("ReduceMean", [x], output, axes=list(axes), keepdims=int(keepdim))


def _linear(g: SegmentWriter, output: str, x: str, weight: str, bias: str | None = None) -> str:
    if len(g.shapes[x]) == 2:
        inputs = [x, weight] if bias is None else [x, weight, bias]
        return g.emit("Gemm", inputs, output, transB=1)
    product = output if bias is None else f"{output}.product"
    g.emit("MatMul", [x, g.transposed(weight)], product)
    return product if bias is None else g.emit("Add", [product, bias], output)


def _attention(
    g: SegmentWriter,
    output: str,
    query: str,
    key: str,
    value: str,
    mask: str | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    **_: Any,
) -> str:
    require(mask is None and not dropout and not causal, "attention is plain, without a mask")
    rank, width = len(g.shapes[query]), g.shapes[query][-1]
    factor = scale if scale is not None else float(width) ** -0.5
    scaled = g.emit("Mul", [query, g.number(f"{output}.scale", factor)], f"{output}.query")
    turned = _transposed_last(g, f"{output}.key", key, rank)
    logits = g.emit("MatMul", [scaled, turned], f"{output}.logits")
    shares = g.emit("Softmax", [logits], f"{output}.shares", axis=-1)
    return g.emit("MatMul", [shares, value], output)


def _transposed_last(g: SegmentWriter, output: str, x: str, rank: int) -> str:
    return g.emit("Transpose", [x], output, perm=[*range(rank - 2), rank - 1, rank - 2])


def _gelu(g: SegmentWriter, output: str, x: str, *, approximate: str = "none") -> str:
    require(approximate == "none", "GELU is exact, by the error function")
    root = g.number(f"{output}.root", float(np.sqrt(2)))
    erf = g.emit("Erf", [g.emit("Div", [x, root], f"{output}.scaled")], f"{output}.erf")
    shifted = g.emit("Add", [erf, g.number(f"{output}.one", 1.0)], f"{output}.shifted")
    half = g.emit("Mul", [x, g.number(f"{output}.half", 0.5)], f"{output}.halved")
    return g.emit("Mul", [half, shifted], output)


def _pairwise(operator: str) -> Callable[..., str]:
    def lower(g: SegmentWriter, output: str, a: str | float, b: str | float) -> str:
        return g.emit(operator, [g.number(output, a), g.number(output, b)], output)

    return lower


def _unary(operator: str) -> Callable[..., str]:
    def lower(g: SegmentWriter, output: str, x: str) -> str:
        return g.emit(operator, [x], output)

    return lower


def _slice(
    g: SegmentWriter,
    output: str,
    x: str,
    axis: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> str:
    start, end = start or 0, _END if end is None else end
    if (start, end, step) == (0, _END, 1):
        return x
    bounds = {"starts": start, "ends": end, "axes": axis, "steps": step}
    return g.emit(
        "Slice", [x, *(g.integers(f"{output}.{k}", v) for k, v in bounds.items())], output
    )


def _unbind(g: SegmentWriter, output: str, x: str, axis: int = 0) -> list[str]:
    """Add each part along ``axis``; return their names."""
    count = g.shapes[x][axis]
    require(isinstance(count, int), "only axes of known size can be unbound")
    parts = []
    for i in range(int(count)):
        at = g.constant(f"{output}.{i}.index", np.array(i, np.int64))
        parts.append(g.emit("Gather", [x, at], f"{output}.{i}", axis=axis))
    return parts


def _getitem(_g: SegmentWriter, _output: str, parts: list[str], index: int) -> str:
    return parts[index]


def _pad(
    g: SegmentWriter,
    output: str,
    x: str,
    pad: list[int],
    mode: str = "constant",
    value: float | None = None,
) -> str:
    require(mode == "constant" and not value, "only zero padding is known")
    # torch: (before, after) from the last axis backwards; ONNX: all befores, then all afters.
    pairs = [*zip(pad[::2], pad[1::2], strict=True)][::-1]
    pairs = [(0, 0)] * (len(g.shapes[x]) - len(pairs)) + pairs
    amounts = [before for before, _ in pairs] + [after for _, after in pairs]
    return g.emit("Pad", [x, g.integers(f"{output}.pads", *amounts)], output)


def _flatten(g: SegmentWriter, output: str, x: str, start: int = 0, end: int = -1) -> str:
    if (start, end) == (1, -1):
        return g.emit("Flatten", [x], output, axis=1)  # unlike Reshape, it takes no rows too
    return _reshape(g, output, x)


def _reshape(g: SegmentWriter, output: str, x: str, *_sizes: object) -> str:
    before, after = g.shapes[x], g.shapes[output]
    require(sum(isinstance(d, str) for d in after) <= 1, "only one size may follow the batch")
    kept = bool(before) and bool(after) and before[0] == after[0]
    sizes = [-1 if isinstance(d, str) else d for d in after]
    if kept:
        sizes[0] = 0  # as it was, which is right for no rows too
    return g.emit("Reshape", [x, g.integers(f"{output}.shape", *sizes)], output)


def _permute(g: SegmentWriter, output: str, x: str, axes: Sequence[int]) -> str:
    rank = len(g.shapes[x])
    return g.emit("Transpose", [x], output, perm=[axis % rank for axis in axes])


def _transpose(g: SegmentWriter, output: str, x: str, a: int, b: int) -> str:
    axes = [*range(len(g.shapes[x]))]
    axes[a], axes[b] = axes[b], axes[a]
    return _permute(g, output, x, axes)


def _cat(g: SegmentWriter, output: str, parts: list[str], axis: int = 0) -> str:
    return g.emit("Concat", parts, output, axis=axis)


OPERATORS: dict[str, Callable[..., Any]] = {
    "aten.conv2d.default": _conv2d,
    "aten.linear.default": _linear,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.batch_norm.default": _batch_norm,
    "aten.layer_norm.default": _layer_norm,
    "aten.relu.default": _unary("Relu"),
    "aten.gelu.default": _gelu,
    "aten.add.Tensor": _pairwise("Add"),
    "aten.sub.Tensor": _pairwise("Sub"),
    "aten.mul.Tensor": _pairwise("Mul"),
    "aten.div.Tensor": _pairwise("Div"),
    "aten.adaptive_avg_pool2d.default": _global_pool,
    "aten.avg_pool2d.default": _avg_pool,
    "aten.max_pool2d.default": _max_pool,
    "aten.mean.dim": _mean,
    "aten.slice.Tensor": _slice,
    "aten.unbind.int": _unbind,
    "<built-in function getitem>": _getitem,
    "aten.cat.default": _cat,
    "aten.pad.default": _pad,
    "aten.flatten.using_ints": _flatten,
    "aten.reshape.default": _reshape,
    "aten.view.default": _reshape,
    "aten.unflatten.int": _reshape,
    "aten.permute.default": _permute,
    "aten.transpose.int": _transpose,
}

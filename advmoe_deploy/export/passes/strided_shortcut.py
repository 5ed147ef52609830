"""Pass that turns a strided slice with zero-padded channels into one 1x1 convolution.

Contract: a chain of ``Slice`` nodes that only stride over height and width, followed by a ``Pad``
that only adds zero channels, becomes a convolution whose weights are 0 and 1. Its outputs are the
same bit for bit. It costs a few multiplications, and it saves more: ONNX Runtime keeps convolutions
in a blocked layout that slicing and padding would force it to leave and enter again.
"""

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from advmoe_deploy.export.graph.writer import constants_of, consumers_of, replace_constants
from advmoe_deploy.export.passes.report import PassReport

_END = np.iinfo(np.int64).max


def strided_shortcut(model: ModelProto) -> PassReport:
    """Rewrite in place; return how many shortcuts were rewritten and why others were not."""
    declined: list[str] = []
    changed: dict[str, NDArray[np.generic]] = {}
    for pad in [n for n in model.graph.node if n.op_type == "Pad"]:
        slices = _slices_before(model, pad)
        match = _match(model, pad, slices)
        if isinstance(match, str):
            declined.append(f"{pad.name}: {match}")
            continue
        strides, weight = match
        name = f"{pad.name}.weight"
        changed[name] = weight
        source = slices[0].input[0] if slices else pad.input[0]
        conv = helper.make_node(
            "Conv", [source, name], list(pad.output), pad.name, kernel_shape=[1, 1], strides=strides
        )
        position = list(model.graph.node).index(pad)
        model.graph.node.insert(position, conv)
        for node in [*slices, pad]:
            model.graph.node.remove(node)
    replace_constants(model, changed)
    return PassReport("strided_shortcut", len(changed), tuple(declined))


def _slices_before(model: ModelProto, pad: NodeProto) -> list[NodeProto]:
    producers = {name: node for node in model.graph.node for name in node.output}
    readers = consumers_of(model)
    chain: list[NodeProto] = []
    node = producers.get(pad.input[0])
    while node is not None and node.op_type == "Slice" and len(readers[node.output[0]]) == 1:
        chain.insert(0, node)
        node = producers.get(node.input[0])
    return chain


def _match(
    model: ModelProto, pad: NodeProto, slices: list[NodeProto]
) -> tuple[list[int], NDArray[np.float32]] | str:
    """Return strides and weights of the convolution, or why there is none."""
    constants = constants_of(model)
    if len(pad.input) > 2 or pad.input[1] not in constants:
        return "it pads with something else than zeros, or by an amount that is no constant"
    amounts = constants[pad.input[1]].astype(int).tolist()
    if len(amounts) != 8 or any(amounts[i] for i in (0, 2, 3, 4, 6, 7)) or min(amounts) < 0:
        return "it pads other axes than channels"
    strides = [1, 1]
    for node in slices:
        start, end, axis, step = (int(constants[name][0]) for name in node.input[1:])
        if start or end != _END or axis not in (2, 3) or step < 1:
            return f"{node.name} does more than stride over height and width"
        strides[axis - 2] *= step
    channels = _channels_of(model, slices[0].input[0] if slices else pad.input[0], constants)
    if channels is None:
        return "the number of channels is unknown"
    before, after = amounts[1], amounts[5]
    weight = np.zeros((before + channels + after, channels, 1, 1), np.float32)
    weight[before + np.arange(channels), np.arange(channels)] = 1
    return strides, weight


def _channels_of(
    model: ModelProto, value: str, constants: dict[str, NDArray[np.float32]]
) -> int | None:
    """Return the channels of ``value``, found at the convolution it comes from."""
    producers = {name: node for node in model.graph.node for name in node.output}
    node = producers.get(value)
    while node is not None and node.op_type in ("Relu", "Add", "BatchNormalization"):
        node = producers.get(node.input[0])
    if node is None or node.op_type != "Conv" or node.input[1] not in constants:
        return None
    return int(constants[node.input[1]].shape[0])

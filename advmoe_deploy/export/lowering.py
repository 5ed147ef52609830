"""From a torch module to an ONNX graph: ``torch.export`` traces, a table of operators lowers.

The table is small on purpose. A segment is a dense graph without control flow, so a dozen operators
say it; each becomes one node that keeps the parameter's own name, which the passes and the checks
rely on. ``torch.onnx`` would fold, rename and expand before we could look.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from torch import fx, nn

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.onnx_graph import GraphWriter
from advmoe_deploy.plan import TensorInfo

_END = np.iinfo(np.int64).max


def onnx_from_module(
    module: nn.Module, name: str, image: TensorInfo, output: TensorInfo
) -> ModelProto:
    """Return ``module`` (one input, one output, eval mode) as ONNX with a dynamic batch.

    Raises:
        CheckFailedError: the module uses an operator that the table does not know.
    """
    example = torch.zeros(2, *(int(size) for size in image.shape[1:]))
    program = torch.export.export(
        module.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("N")},)
    )
    lowering = _Lowering(program, image.name, output.name)
    lowering.run()
    return lowering.writer.model(name, [image], [output])


class _Lowering:
    """Walks a traced program once, node by node."""

    def __init__(self, program: torch.export.ExportedProgram, image: str, output: str) -> None:
        self.writer = GraphWriter()
        self.program = program
        self.names: dict[fx.Node, str] = {}
        self.image, self.output = image, output

    def run(self) -> None:
        """Lower every node."""
        signature = self.program.graph_signature
        parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        values = {**self.program.state_dict, **self.program.constants}
        (result,) = self.program.graph.output_node().args[0]
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name in parameters:
                target = parameters[node.name]
                if node.users:
                    self.names[node] = self.writer.constant(target, values[target].detach().numpy())
            elif node.op == "placeholder":
                self.names[node] = self.image
            elif node.op == "call_function":
                self.names[node] = self._lower(node, self.output if node is result else node.name)

    def _lower(self, node: fx.Node, output: str) -> str:
        lower = _OPERATORS.get(str(node.target))
        if lower is None:
            known = ", ".join(sorted(_OPERATORS))
            raise CheckFailedError(f"cannot export {node.target}; known operators: {known}")
        inputs = [self.names[a] if isinstance(a, fx.Node) else a for a in node.args]
        made: str = lower(self.writer, output, *inputs, **node.kwargs)
        return made


def _require(holds: bool, limit: str) -> None:
    if not holds:
        raise CheckFailedError(f"cannot export this model: {limit}")


def _conv2d(
    g: GraphWriter,
    output: str,
    x: str,
    weight: str,
    bias: str | None = None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> str:
    return g.emit(
        "Conv",
        [x, weight] if bias is None else [x, weight, bias],
        output,
        kernel_shape=list(g.initializers[weight].dims[2:]),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )


def _batch_norm(
    g: GraphWriter,
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
    _require(not training, "a segment is exported in eval mode")
    return g.emit("BatchNormalization", [x, weight, bias, mean, variance], output, epsilon=epsilon)


def _slice(
    g: GraphWriter,
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


def _pad(
    g: GraphWriter,
    output: str,
    x: str,
    pad: list[int],
    mode: str = "constant",
    value: float | None = None,
) -> str:
    _require(mode == "constant" and not value, "only zero padding is known")
    # torch: (before, after) from the last axis backwards; ONNX: all befores, then all afters.
    pairs = [*zip(pad[::2], pad[1::2], strict=True)][::-1]
    pairs = [(0, 0)] * (4 - len(pairs)) + pairs
    amounts = [before for before, _ in pairs] + [after for _, after in pairs]
    return g.emit("Pad", [x, g.integers(f"{output}.pads", *amounts)], output)


def _pool(g: GraphWriter, output: str, x: str, size: list[int]) -> str:
    _require(list(size) == [1, 1], "only global average pooling is known")
    return g.emit("GlobalAveragePool", [x], output)


def _flatten(g: GraphWriter, output: str, x: str, start: int = 0, end: int = -1) -> str:
    _require((start, end) == (1, -1), "only flattening to rows is known")
    return g.emit("Flatten", [x], output, axis=1)


def _linear(g: GraphWriter, output: str, x: str, weight: str, bias: str | None = None) -> str:
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return g.emit("Gemm", inputs, output, transB=1)


def _pairwise(operator: str) -> Callable[..., str]:
    def lower(g: GraphWriter, output: str, a: str, b: str) -> str:
        return g.emit(operator, [a, b], output)

    return lower


def _relu(g: GraphWriter, output: str, x: str) -> str:
    return g.emit("Relu", [x], output)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "aten.conv2d.default": _conv2d,
    "aten.batch_norm.default": _batch_norm,
    "aten.relu.default": _relu,
    "aten.add.Tensor": _pairwise("Add"),
    "aten.sub.Tensor": _pairwise("Sub"),
    "aten.div.Tensor": _pairwise("Div"),
    "aten.slice.Tensor": _slice,
    "aten.pad.default": _pad,
    "aten.adaptive_avg_pool2d.default": _pool,
    "aten.flatten.using_ints": _flatten,
    "aten.linear.default": _linear,
}

"""From a traced torch program to ONNX graphs, node by node, by a table of operators.

Parameters keep their own names, which the passes and the checks rely on; ``torch.onnx`` would fold,
rename and expand before we could look.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import fx, nn

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.operators import OPERATORS
from advmoe_deploy.export.segment_writer import SegmentWriter, Shape
from advmoe_deploy.plan import TensorInfo

BATCH = "N"


class Program:
    """A traced module with one input and one output, and what its nodes are."""

    def __init__(self, module: nn.Module, image_shape: tuple[int, ...]) -> None:
        """Trace ``module``, in eval mode, on a batch of two that stands for any.

        Its one argument are images [N, *image_shape], its answer one tensor.
        """
        example = torch.zeros(2, *image_shape)
        with torch.no_grad():
            self.exported = torch.export.export(
                module.eval(), (example,), dynamic_shapes=({0: torch.export.Dim(BATCH)},)
            )
        self.constants = self._constants()
        nodes = self.exported.graph.nodes
        (self.image,) = (n for n in nodes if n.op == "placeholder" and n not in self.constants)
        (self.result,) = self.exported.graph.output_node().args[0]
        self._batch = str(self.image.meta["val"].shape[0])

    def _constants(self) -> dict[fx.Node, tuple[str, torch.Tensor]]:
        signature = self.exported.graph_signature
        names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        values = {**self.exported.state_dict, **self.exported.constants}
        return {
            node: (names[node.name], values[names[node.name]])
            for node in self.exported.graph.nodes
            if node.op == "placeholder" and node.name in names
        }

    def shape(self, node: fx.Node) -> Shape:
        """Return the shape of a tensor; sizes that follow the batch read like ``16*N``."""
        return tuple(
            size if isinstance(size, int) else str(size).replace(self._batch, BATCH)
            for size in node.meta["val"].shape
        )

    def needed(self, results: Iterable[fx.Node], given: Iterable[fx.Node] = ()) -> list[fx.Node]:
        """Return, in order, the operations that ``results`` come from, back to ``given``."""
        seen = {self.image, *self.constants, *given}
        found: set[fx.Node] = set()
        waiting = [node for node in results if node not in seen]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [n for n in node.all_input_nodes if n not in seen]
        return [node for node in self.exported.graph.nodes if node in found]

    def run(self, images: NDArray[np.float32], wanted: set[fx.Node]) -> dict[fx.Node, Any]:
        """Return the values of the ``wanted`` nodes for ``images``, as arrays."""
        recorder = _Recorder(self.exported.graph_module, wanted)
        arguments = {node: value for node, (_, value) in self.constants.items()}
        arguments[self.image] = torch.from_numpy(images)
        with torch.inference_mode():
            recorder.run(*(arguments[n] for n in arguments_of(self.exported.graph)))
        return recorder.seen


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.seen[n] = np.ascontiguousarray(value.numpy())
        return value


def arguments_of(graph: fx.Graph) -> list[fx.Node]:
    """Return the placeholders of ``graph`` in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def is_tensor(node: fx.Node) -> bool:
    """Return whether ``node`` is a tensor or several, and not a size."""
    return not isinstance(node.meta.get("val"), (int, torch.SymInt))


def onnx_from_module(
    module: nn.Module, name: str, image: TensorInfo, output: TensorInfo
) -> ModelProto:
    """Return ``module`` (one input, one output, eval mode) as ONNX with a dynamic batch.

    Raises:
        CheckFailedError: the module uses an operator that the table does not know.
    """
    program = Program(module, tuple(int(size) for size in image.shape[1:]))
    writer = lower(program, program.needed([program.result]), {program.image: image.name}, {program.result: output.name})
    return writer.model(name, [image], [output])


def lower(
    program: Program,
    nodes: Iterable[fx.Node],
    inputs: Mapping[fx.Node, str],
    outputs: Mapping[fx.Node, str],
) -> SegmentWriter:
    """Return ``nodes`` of ``program`` as a graph; inputs and outputs get the names given.

    Parameters lose the module path that they all share; other values are numbered by operator, so
    that experts of one structure become graphs with the same names.

    Raises:
        CheckFailedError: a node is an operator that the table does not know.
    """
    nodes = [node for node in nodes if is_tensor(node)]
    writer = SegmentWriter(inputs.values())
    walk = _Walk(program, writer, inputs, _constant_names(program, nodes))
    for node in nodes:
        walk.lower(node, outputs.get(node))
    return writer


def _constant_names(program: Program, nodes: list[fx.Node]) -> dict[fx.Node, str]:
    used = {a: None for n in nodes for a in n.all_input_nodes if a in program.constants}
    paths = {node: program.constants[node][0].split(".") for node in used}
    shared = 0
    for parts in zip(*(path[:-1] for path in paths.values()), strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    return {node: ".".join(path[shared:]) for node, path in paths.items()}


class _Walk:
    """Lowers nodes one by one into a writer."""

    def __init__(
        self,
        program: Program,
        writer: SegmentWriter,
        inputs: Mapping[fx.Node, str],
        constants: Mapping[fx.Node, str],
    ) -> None:
        self.program, self.writer = program, writer
        self.names: dict[fx.Node, Any] = dict(inputs)
        self.count: Counter[str] = Counter()
        for node, name in inputs.items():
            writer.shapes[name] = program.shape(node)
        for node, name in constants.items():
            values = program.constants[node][1].detach().numpy()
            self.names[node] = writer.constant(name, values)
            writer.shapes[name] = values.shape

    def lower(self, node: fx.Node, output: str | None) -> None:
        """Lower ``node``; its value is called ``output`` where that is given."""
        operator = OPERATORS.get(str(node.target))
        if operator is None:
            known = ", ".join(sorted(OPERATORS))
            raise CheckFailedError(f"cannot export {node.target}; known operators: {known}")
        name = output or self._new_name(node)
        one = isinstance(node.meta["val"], torch.Tensor)
        if one:
            self.writer.shapes[name] = self.program.shape(node)
        made = operator(self.writer, name, *self._named(node.args), **self._named(node.kwargs))
        if one:  # an operator may hand on a value that there is already
            self.writer.shapes[made] = self.program.shape(node)
        if output is not None and made != output:
            made = self.writer.emit("Identity", [made], output)
        self.names[node] = made

    def _new_name(self, node: fx.Node) -> str:
        kind = str(node.target).split(".")[1] if "." in str(node.target) else "part"
        self.count[kind] += 1
        return f"{kind}_{self.count[kind]}"

    def _named(self, arguments: Any) -> Any:
        return fx.node.map_arg(arguments, lambda node: self.names.get(node))

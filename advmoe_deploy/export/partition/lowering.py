"""Lowering of a traced torch program to ONNX graphs, node by node, by a table of operators.

Parameters keep their own names, which the passes and the checks rely on; ``torch.onnx`` would fold,
rename and expand before we could look.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.partition.operators import OPERATORS
from advmoe_deploy.export.partition.segment_writer import SegmentWriter, Shape
from advmoe_deploy.parity.rounding import disturbed
from advmoe_deploy.progress import Progress, Silent, task

BATCH_AXIS = "N"
_TRACE = "trace layers"


class TracedModule:
    """A traced module with one input and one output, and what its nodes are."""

    def __init__(
        self, module: nn.Module, image_shape: tuple[int, ...], progress: Progress | None = None
    ) -> None:
        """Trace ``module``, in eval mode, on a batch of two that stands for any.

        Its one argument are images [N, *image_shape], its answer one tensor; ``progress`` hears of
        each layer.
        """
        example = torch.zeros(2, *image_shape)
        with _told(module, progress or Silent()), torch.no_grad():
            self.exported = torch.export.export(
                module.eval(), (example,), dynamic_shapes=({0: torch.export.Dim(BATCH_AXIS)},)
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
            size if isinstance(size, int) else str(size).replace(self._batch, BATCH_AXIS)
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

    def evaluate(
        self,
        results: Iterable[fx.Node],
        given: Mapping[fx.Node, torch.Tensor],
        dtype: torch.dtype = torch.float32,
        *,
        draw: int | None = None,
    ) -> dict[fx.Node, torch.Tensor]:
        """Return the values of ``results``, computed in ``dtype`` from those of ``given``.

        With a ``draw``, by disturbed parameters, see :mod:`advmoe_deploy.parity.rounding`.
        """
        results = list(results)
        nodes = self.needed(results, given)
        read = {*results, *(n for node in nodes for n in node.all_input_nodes)}
        constants = {n: v for n, (_, v) in self.constants.items() if n in read}
        values: dict[fx.Node, Any] = {n: v.to(dtype) for n, v in constants.items()}
        if draw is not None:
            for n, v in constants.items():
                if isinstance(v, nn.Parameter):
                    values[n] = disturbed(v, draw).to(dtype)
        values |= {node: value.to(dtype) for node, value in given.items()}
        with torch.inference_mode():
            for node in nodes:
                assert callable(node.target)
                arguments = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*arguments[0], **arguments[1])
        return {node: values[node] for node in results}


@contextmanager
def _told(module: nn.Module, progress: Progress) -> Iterator[None]:
    """Tell ``progress`` of every layer once: as ``module`` first runs it in the block, or after."""
    layers = [each for each in module.modules() if next(each.children(), None) is None]
    waiting = set(layers)

    def ran(layer: nn.Module, *_: object) -> None:
        if layer in waiting:  # experts may share a layer, which then runs again
            waiting.remove(layer)
            progress.advance(_TRACE)

    with task(progress, _TRACE, len(layers)):
        hooks = [layer.register_forward_hook(ran) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if waiting:  # which the model holds and never runs
            progress.advance(_TRACE, len(waiting))


def is_tensor(node: fx.Node) -> bool:
    """Return whether ``node`` is a tensor or several, and not a size."""
    return not isinstance(node.meta.get("val"), (int, torch.SymInt))


def lower(
    program: TracedModule,
    nodes: Iterable[fx.Node],
    inputs: Mapping[fx.Node, str],
    outputs: Mapping[fx.Node, str],
    path: str = "",
) -> SegmentWriter:
    """Return ``nodes`` of ``program`` as a graph; inputs and outputs get the names given.

    Parameters lose ``path`` where their names begin so, and values are numbered by operator:
    experts of one structure become graphs with the same names.

    Raises:
        CheckFailedError: a node is an operator that the table does not know.
    """
    writer = SegmentWriter()
    walk = _Walk(program, writer, inputs, path)
    for node in nodes:
        if is_tensor(node):
            walk.lower(node, outputs.get(node))
    return writer


def shared_path(program: TracedModule, nodes: Iterable[fx.Node]) -> str:
    """Return the module path, with a dot behind it, in which all parameters of ``nodes`` lie."""
    used = {a for node in nodes for a in node.all_input_nodes if a in program.constants}
    modules = [program.constants[a][0].split(".")[:-1] for a in used]
    levels = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*modules, strict=False))
    return "".join(f"{names[0]}." for names in levels)


class _Walk:
    """Lowers nodes one by one into a writer."""

    def __init__(
        self,
        program: TracedModule,
        writer: SegmentWriter,
        inputs: Mapping[fx.Node, str],
        path: str,
    ) -> None:
        self.program, self.writer, self.path = program, writer, path
        self.names: dict[fx.Node, Any] = dict(inputs)
        self.count: Counter[str] = Counter()
        for node, name in inputs.items():
            writer.shapes[name] = program.shape(node)

    def lower(self, node: fx.Node, output: str | None) -> None:
        """Lower ``node``; its value is called ``output`` where that is given."""
        operator = OPERATORS.get(str(node.target))
        if operator is None:
            known = ", ".join(sorted(OPERATORS))
            raise CheckFailedError(f"cannot export {node.target}; known operators: {known}")
        name = output or self._new_name(node)
        for read in node.all_input_nodes:
            if read in self.program.constants and read not in self.names:
                self._add_constant(read)
        one = isinstance(node.meta["val"], torch.Tensor)
        if one:
            self.writer.shapes[name] = self.program.shape(node)
        made = operator(self.writer, name, *self._named(node.args), **self._named(node.kwargs))
        if one:  # an operator may hand on a value that there is already
            self.writer.shapes[made] = self.program.shape(node)
        if output is not None and made != output:
            made = self.writer.emit("Identity", [made], output)
        self.names[node] = made

    def _add_constant(self, node: fx.Node) -> None:
        path, tensor = self.program.constants[node]
        name = self.writer.constant(path.removeprefix(self.path), tensor.detach().numpy())
        self.writer.shapes[name] = tuple(tensor.shape)
        self.names[node] = name

    def _new_name(self, node: fx.Node) -> str:
        kind = str(node.target).split(".")[1] if "." in str(node.target) else "part"
        self.count[kind] += 1
        return f"{kind}_{self.count[kind]}"

    def _named(self, arguments: Any) -> Any:
        return fx.node.map_arg(arguments, lambda node: self.names.get(node))

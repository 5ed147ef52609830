"""The baseline a mixture of experts has to beat: every expert computed on every row, then selected.

Each routed convolution becomes one convolution with the channels of all experts, as the papers'
released layers compute it, BatchNorm folded per expert. It is given its best form: what the experts
share is computed once, an activation that only follows the convolution runs inside it, and the
selection copies whole experts, not elements.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.onnx_graph import GraphWriter, attributes_of, constants_of, consumers_of
from advmoe_deploy.export.stitch import inline, plan_outputs, write_route
from advmoe_deploy.plan import ExpertsStep, Plan


def unfused_graph(plan: Plan, segments: Mapping[str, ModelProto]) -> ModelProto:
    """Return the AdvMoE of ``plan`` with every expert computed; same inputs, same outputs.

    Raises:
        CheckFailedError: the pathways differ in more than the weights of convolutions.
    """
    (route,) = plan.routes
    (experts,) = (step for step in plan.steps if isinstance(step, ExpertsStep))
    writer = GraphWriter()
    router = inline(segments["router"], "router", {"images": "images", route.scores: route.scores})
    writer.nodes += router.nodes
    writer.initializers |= {tensor.name: tensor for tensor in router.initializers}
    write_route(writer, route)
    _Merge(writer, [segments[name] for name in experts.segments], route.expert_ids).run()
    (image,) = plan.segment("router").inputs
    return writer.model("unfused", [image], plan_outputs(plan))


class _Merge:
    """Walks the pathways side by side and writes what they have in common once."""

    def __init__(self, writer: GraphWriter, pathways: Sequence[ModelProto], ids: str) -> None:
        self.writer, self.pathways, self.ids = writer, pathways, ids
        self.constants = [constants_of(model) for model in pathways]
        self.readers = consumers_of(pathways[0])
        inferred = onnx.shape_inference.infer_shapes(pathways[0], strict_mode=True)
        self.shapes = {
            info.name: [d.dim_value for d in info.type.tensor_type.shape.dim]
            for info in inferred.graph.value_info
        }
        self.inside_conv: set[str] = set()

    def run(self) -> None:
        """Write every node of the merged pathway."""
        for nodes in zip(*(model.graph.node for model in self.pathways), strict=True):
            first = nodes[0]
            if first.output[0] in self.inside_conv:
                continue
            if any(n.op_type != first.op_type or n.output != first.output for n in nodes):
                raise CheckFailedError(f"pathways differ at {first.name}; please report it")
            if first.op_type == "Conv" and not self._is_shared(first.input[1]):
                self._write_bank(first)
            else:
                self._write_shared(first)

    def _is_shared(self, name: str) -> bool:
        values = [constants[name] for constants in self.constants]
        return all(np.array_equal(values[0], other) for other in values[1:])

    def _write_shared(self, node: NodeProto) -> None:
        for name in set(node.input) & self.constants[0].keys():
            if not self._is_shared(name):
                raise CheckFailedError(f"{name} differs between experts in a {node.op_type}")
            self.writer.constant(name, self.constants[0][name])
        self.writer.nodes.append(node)

    def _write_bank(self, conv: NodeProto) -> None:
        """Write one convolution of all experts, the activation it may swallow, and the choice."""
        banks = [self.writer.constant(name, self._bank(name)) for name in conv.input[1:]]
        name = conv.output[0]
        every = self.writer.emit(
            "Conv", [conv.input[0], *banks], f"{name}.every", **attributes_of(conv)
        )
        readers = self.readers[name]
        if len(readers) == 1 and readers[0].op_type == "Relu":
            every = self.writer.emit("Relu", [every], f"{name}.active")
            chosen = readers[0].output[0]
            self.inside_conv.add(chosen)
        else:
            chosen = name
        self._write_choice(every, name, chosen)

    def _bank(self, name: str) -> NDArray[np.float32]:
        return np.concatenate([constants[name] for constants in self.constants])

    def _write_choice(self, every: str, conv: str, chosen: str) -> None:
        _, channels, height, width = self.shapes[conv]
        experts = len(self.pathways)
        split = self.writer.integers(f"{conv}.split", 0, experts, channels * height * width)
        shape = self.writer.integers(f"{conv}.shape", 0, channels, height, width)
        by_expert = self.writer.emit("Reshape", [every, split], f"{conv}.by_expert")
        rows = self.writer.emit("GatherND", [by_expert, self.ids], f"{conv}.chosen", batch_dims=1)
        self.writer.emit("Reshape", [rows, shape], chosen)

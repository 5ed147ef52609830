"""Writer of ONNX graphs: small pieces, and what all our graphs have in common."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx import numpy_helper as onnx_numpy

from advmoe_deploy import __version__
from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.plan import TensorInfo
from advmoe_deploy.runtime.onnxruntime.custom_ops import DOMAIN

# The oldest pair that says all we need: old runtimes and other vendors read it too.
OPSET = 17
IR_VERSION = 8

_ELEMENT_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


class GraphWriter:
    """Collects nodes and constants; each verb returns the name of the value it made."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.inner: list[TensorInfo] = []  # of inner values, where an operator hides them

    def emit(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node with one output and return that output's name."""
        self.nodes.append(
            helper.make_node(operator, list(inputs), [output], name=output, **attributes)
        )
        return output

    def emit_custom(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any
    ) -> None:
        """Add a custom operator of ours."""
        self.nodes.append(
            helper.make_node(
                operator,
                list(inputs),
                list(outputs),
                name=outputs[0],
                domain=DOMAIN,
                **attributes,
            )
        )

    def constant(self, name: str, values: NDArray[np.generic]) -> str:
        """Add a constant, once per name, and return its name."""
        if name not in self.initializers:
            self.initializers[name] = onnx_numpy.from_array(np.asarray(values, order="C"), name)
        return name

    def integers(self, name: str, *values: int) -> str:
        """Add a vector of int64 and return its name."""
        return self.constant(name, np.array(values, np.int64))

    def model(
        self, name: str, inputs: Iterable[TensorInfo], outputs: Iterable[TensorInfo]
    ) -> ModelProto:
        """Return everything written so far as a model."""
        graph = helper.make_graph(
            self.nodes,
            name,
            [value_info(t) for t in inputs],
            [value_info(t) for t in outputs],
            list(self.initializers.values()),
            value_info=[value_info(t) for t in self.inner],
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="advmoe-deploy",
            producer_version=__version__,
        )


def value_info(tensor: TensorInfo) -> ValueInfoProto:
    """Return the ONNX declaration of ``tensor``."""
    return helper.make_tensor_value_info(
        tensor.name, _ELEMENT_TYPES[tensor.dtype], list(tensor.shape)
    )


def constants_of(model: ModelProto) -> dict[str, NDArray[np.float32]]:
    """Return the constants of the main graph by name."""
    return {t.name: onnx_numpy.to_array(t) for t in model.graph.initializer}


def replace_constants(model: ModelProto, changed: Mapping[str, NDArray[np.generic]]) -> None:
    """Set the constants in ``changed``, in place, and drop those that no node reads any more."""
    used = {name for node in model.graph.node for name in node.input}
    kept = {t.name: t for t in model.graph.initializer if t.name in used}
    for name, values in changed.items():
        kept[name] = onnx_numpy.from_array(np.ascontiguousarray(values), name)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept.values())


def scale_and_shift(
    norm: NodeProto, constants: Mapping[str, NDArray[np.float32]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what a BatchNormalization with constant parameters does: x * scale [C] + shift [C].

    In float64, so that what takes them over is rounded once.
    """
    scale_C, shift_C, mean_C, variance_C = (
        constants[name].astype(np.float64) for name in norm.input[1:]
    )
    factor_C = scale_C / np.sqrt(variance_C + attributes_of(norm).get("epsilon", 1e-5))
    return factor_C, shift_C - mean_C * factor_C


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Return the attributes of ``node`` as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def subgraphs_of(node: NodeProto) -> list[onnx.GraphProto]:
    """Return the graphs that ``node`` carries, such as the branches of an ``If``."""
    return [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]


def consumers_of(model: ModelProto) -> dict[str, list[NodeProto]]:
    """Return who reads each value of the main graph; graph outputs are not counted."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def write_model(model: ModelProto, file: Path) -> None:
    """Check ``model`` as strictly as ONNX can and write it.

    Raises:
        CheckFailedError: ONNX finds the model invalid.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckFailedError(
            f"{file.name} is no valid ONNX: {reason}; please report it"
        ) from None
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(model.SerializeToString(deterministic=True))

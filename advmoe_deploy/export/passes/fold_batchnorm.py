"""Pass that folds a BatchNormalization into the convolution before it.

Contract: for every ``Conv -> BatchNormalization`` whose parameters are constants and whose
convolution nobody else reads, the convolution takes over scale and shift and the normalisation
disappears. Outputs change by rounding only. Every other normalisation stays, with a reason.
"""

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from advmoe_deploy.export.graph.writer import (
    constants_of,
    consumers_of,
    replace_constants,
    scale_and_shift,
)
from advmoe_deploy.export.passes.report import PassReport

Constants = dict[str, NDArray[np.float32]]


def fold_batchnorm(model: ModelProto) -> PassReport:
    """Fold in place; return how many were folded and why the others were not."""
    constants = constants_of(model)
    producers = {name: node for node in model.graph.node for name in node.output}
    changed: Constants = {}
    declined = []
    folded = 0
    for norm in [n for n in model.graph.node if n.op_type == "BatchNormalization"]:
        conv = producers.get(norm.input[0])
        if reason := _why_not(model, norm, conv, constants):
            declined.append(f"{norm.name}: {reason}")
            continue
        assert conv is not None
        _fold(conv, norm, constants, changed)
        model.graph.node.remove(norm)
        folded += 1
    replace_constants(model, changed)
    return PassReport("fold_batchnorm", folded, tuple(declined))


def _why_not(
    model: ModelProto, norm: NodeProto, conv: NodeProto | None, constants: Constants
) -> str | None:
    if conv is None or conv.op_type != "Conv":
        return "its input is no convolution"
    readers = consumers_of(model)
    if len(readers[conv.output[0]]) > 1 or conv.output[0] in {o.name for o in model.graph.output}:
        return "something else reads the convolution too"
    if any(name not in constants for name in [*norm.input[1:], *conv.input[1:]]):
        return "its parameters are not constants"
    if len(readers[conv.input[1]]) > 1:
        return "another node shares the convolution's weight"
    return None


def _fold(conv: NodeProto, norm: NodeProto, constants: Constants, changed: Constants) -> None:
    factor_C, shift_C = scale_and_shift(norm, constants)
    weight = constants[conv.input[1]] * factor_C[:, None, None, None]
    bias_C = constants[conv.input[2]] * factor_C if len(conv.input) > 2 else 0.0
    weight_name = conv.input[1]
    bias_name = f"{weight_name.removesuffix('.weight')}.bias"
    changed[weight_name] = weight.astype(np.float32)
    changed[bias_name] = (shift_C + bias_C).astype(np.float32)
    del conv.input[2:]
    conv.input.append(bias_name)
    conv.output[0] = norm.output[0]

"""The table of the operators says what bodies and kernels do."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import defs, helper

from advmoe_deploy.export.graph.op_bodies import OPSET_VERSION, bodies, with_bodies
from advmoe_deploy.export.graph.op_schemas import (
    CUSTOM_OPERATORS,
    Operator,
    reference,
    register_schemas,
)
from advmoe_deploy.runtime.onnxruntime.custom_ops import DOMAIN
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from tests.runtime.onnxruntime.test_custom_ops import TYPES, without_body

SIZES = {"R": 4, "C": 5, "D": 6, "H": 3, "W": 2, "E": 3, "K": 2, "1": 1, "E+1": 4, "S": 8}
VALUES = {"k": 2, "epsilon": 1e-5, "num_experts": 3}
PAGE = Path(__file__).parents[3] / "docs" / "reference" / "custom-ops.md"


@pytest.fixture
def registered() -> Iterator[None]:
    """The schemas, known to onnx for one test."""
    register_schemas()
    register_schemas()
    yield
    for operator in CUSTOM_OPERATORS:
        defs.deregister_schema(operator.name, OPSET_VERSION, DOMAIN)


def sizes_of(operator: Operator) -> dict[str, int]:
    """Return the sizes of a small example."""
    alone = operator.name == "ExpertCombine"
    return {**SIZES, "S": SIZES["R"] if alone else SIZES["R"] * SIZES["K"]}


def inputs_of(operator: Operator) -> dict[str, np.ndarray]:
    sizes, inputs = sizes_of(operator), {}
    for argument in operator.inputs:
        shape = [sizes[letter] for letter in argument.shape if letter != "..."]
        shape += [6, 7] if "..." in argument.shape else []
        if argument.type == "float":
            inputs[argument.name] = np.ones(shape, np.float32)
        else:
            inputs[argument.name] = np.arange(np.prod(shape)).reshape(shape) % sizes["S"]
    if "ids" in inputs:
        inputs["ids"] %= sizes["E"]
    if "offsets" in inputs:
        inputs["offsets"][-1] = sizes["S"]
    return inputs


def attributes_of(operator: Operator) -> dict[str, float]:
    return {a.name: VALUES[a.name] for a in operator.attributes}


def test_every_operator_has_a_row_and_a_body() -> None:
    assert [operator.name for operator in CUSTOM_OPERATORS] == list(bodies())
    for operator in CUSTOM_OPERATORS:
        body = bodies()[operator.name]
        assert [argument.name for argument in operator.inputs] == list(body.input)
        assert [argument.name for argument in operator.outputs] == list(body.output)
        assert [attribute.name for attribute in operator.attributes] == list(body.attribute)


@pytest.mark.parametrize("operator", CUSTOM_OPERATORS, ids=lambda operator: operator.name)
def test_types_and_shapes_are_what_comes_out(operator: Operator, registered: None) -> None:
    inputs = inputs_of(operator)
    model = without_body(operator.name, inputs, **attributes_of(operator))
    for info, values in zip(model.graph.input, inputs.values(), strict=True):
        for dim, size in zip(info.type.tensor_type.shape.dim, values.shape, strict=True):
            dim.dim_value = size
    del model.graph.output[:]
    for argument in operator.outputs:
        model.graph.output.append(helper.make_empty_tensor_value_info(argument.name))
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    onnx.checker.check_model(inferred, full_check=True)
    with OrtEngine(with_bodies(inferred).SerializeToString(), custom_ops="bodies") as engine:
        answer = engine.run(inputs)
    for info in inferred.graph.output:
        found, type_ = answer[info.name], info.type.tensor_type
        assert type_.elem_type == TYPES[str(found.dtype)]
        dims = [d.dim_value if d.HasField("dim_value") else None for d in type_.shape.dim]
        # S is a product, which no letter of the inputs tells.
        assert dims == ([None] if info.name == "rows" else list(found.shape))


def test_a_wrong_type_is_found(registered: None) -> None:
    ids = np.zeros((2, 1), np.float32)
    model = without_body("ExpertDispatch", {"ids": ids}, num_experts=2)
    with pytest.raises(Exception, match="int64"):
        onnx.checker.check_model(model, full_check=True)


def test_the_page_holds_the_table() -> None:
    assert reference() in PAGE.read_text()

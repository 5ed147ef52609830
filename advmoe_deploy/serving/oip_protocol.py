"""The Open Inference Protocol, version 2, as values: bytes to a checked request, answer to bytes.

Knows no transport, so that REST and, later, gRPC share it. The binary tensor extension is the one
stock clients use: JSON first, its length in a header of the transport, raw tensors after it.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, StrictInt, StrictStr, ValidationError

from advmoe_deploy import __version__
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.specs import one_line

INPUT = "images"
VERSION = "1"
SERVER = {
    "name": "advmoe-deploy",
    "version": __version__,
    "extensions": ["binary_tensor_data"],
}


class RefusedError(UsageError):
    """A request that is not answered; ``status`` is its HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What one request may ask for: images, and bytes of body."""

    max_batch: int = 1024
    max_body: int = 64 << 20


@dataclass(frozen=True)
class ServedModel:
    """Name, tensors and limits of a model on offer; ``outputs`` maps names to (dtype, shape)."""

    name: str
    image_shape: tuple[int, int, int]
    outputs: dict[str, tuple[str, tuple[int, ...]]]
    limits: Limits = field(default_factory=Limits)

    def metadata(self) -> dict[str, Any]:
        """Return the model metadata response."""
        outputs = [
            {"name": name, "datatype": dtype, "shape": [-1, *shape]}
            for name, (dtype, shape) in self.outputs.items()
        ]
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": "advmoe-deploy",
            "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *self.image_shape]}],
            "outputs": outputs,
        }

    def require(self, name: str, version: str = VERSION) -> None:
        """Raise :class:`RefusedError` (404) if another model or version is meant."""
        if name != self.name:
            raise RefusedError(f"unknown model '{name}'; this server has '{self.name}'", 404)
        if version != VERSION:
            raise RefusedError(f"unknown version '{version}' of '{name}'; it has '{VERSION}'", 404)


def served_model(
    bundle: Bundle, name: str | None = None, limits: Limits | None = None
) -> ServedModel:
    """Return how ``bundle`` is offered; by default under the name of its model family."""
    spec = bundle.manifest.model
    outputs: dict[str, tuple[str, tuple[int, ...]]] = {"logits": ("FP32", (spec.num_classes,))}
    for route in bundle.manifest.plan.routes:
        shape = tuple(int(size) for size in route.shape[1:])
        outputs |= {route.expert_ids: ("INT64", shape), route.weights: ("FP32", shape)}
    return ServedModel(name or spec.family, spec.image_shape, outputs, limits or Limits())


class _Tensor(BaseModel):
    name: StrictStr
    shape: list[StrictInt] = []
    datatype: StrictStr = ""
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class _Wanted(BaseModel):
    name: StrictStr
    parameters: dict[str, Any] = {}


class _Message(BaseModel):
    id: StrictStr | None = None
    parameters: dict[str, Any] = {}
    inputs: list[_Tensor] = Field(max_length=16)
    outputs: list[_Wanted] = Field([], max_length=256)


@dataclass(frozen=True)
class InferRequest:
    """A checked request: ``images`` float32 [N, C, H, W] in [0, 1]; ``wanted`` name -> binary."""

    images: NDArray[np.float32]
    wanted: dict[str, bool]
    id: str | None = None


@dataclass(frozen=True)
class InferResponse:
    """A body; ``json_length`` bytes of it are JSON where binary tensors follow, else ``None``."""

    body: bytes
    json_length: int | None


def read_request(body: bytes, json_length: int | None, model: ServedModel) -> InferRequest:
    """Return what ``body`` asks of ``model``.

    Raises:
        RefusedError: it is malformed, of a wrong shape or type, or outside the limits.
    """
    if json_length is not None and not 0 <= json_length <= len(body):
        raise RefusedError(f"header length {json_length} is outside the body of {len(body)} bytes")
    message = _parse(body if json_length is None else body[:json_length])
    tail = None if json_length is None else memoryview(body)[json_length:]
    return InferRequest(_images(message, tail, model), _wanted(message, model), message.id)


def write_response(
    prediction: Prediction, request: InferRequest, model: ServedModel
) -> InferResponse:
    """Return the response that carries what ``request`` wanted of ``prediction``."""
    outputs, raw = [], b""
    for name, binary in request.wanted.items():
        dtype = model.outputs[name][0]
        array = np.ascontiguousarray(_output(prediction, name), "<f4" if dtype == "FP32" else "<i8")
        if not np.isfinite(array).all():
            raise RefusedError(f"the model's {name} are not finite", 500)
        output: dict[str, Any] = {"name": name, "datatype": dtype, "shape": list(array.shape)}
        if binary:
            output["parameters"] = {"binary_data_size": array.nbytes}
            raw += array.tobytes()
        else:
            output["data"] = array.ravel().tolist()
        outputs.append(output)
    message: dict[str, Any] = {"model_name": model.name, "model_version": VERSION}
    if request.id is not None:
        message["id"] = request.id
    text = json.dumps({**message, "outputs": outputs}).encode()
    return InferResponse(text + raw, len(text) if any(request.wanted.values()) else None)


def _parse(text: bytes) -> _Message:
    try:
        return _Message.model_validate(json.loads(text))
    except ValidationError as error:
        raise RefusedError(one_line(error)) from None
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the body is no JSON: {error}") from None


def _images(message: _Message, tail: memoryview | None, model: ServedModel) -> NDArray[np.float32]:
    if [tensor.name for tensor in message.inputs] != [INPUT]:
        names = [tensor.name for tensor in message.inputs]
        raise RefusedError(f"inputs are {names}; send exactly one, called '{INPUT}'")
    (tensor,) = message.inputs
    if tensor.datatype != "FP32":
        raise RefusedError(f"{INPUT} has datatype '{tensor.datatype}'; send FP32 in [0, 1]")
    _check_shape(tensor.shape, model)
    size = tensor.parameters.get("binary_data_size")
    values = _from_json(tensor) if size is None else _from_binary(tensor, size, tail)
    if not np.isfinite(values).all():
        raise RefusedError(f"{INPUT} holds values that are not finite")
    if values.min() < 0 or values.max() > 1:
        raise RefusedError(
            f"{INPUT} ranges over [{values.min():.4g}, {values.max():.4g}]; scale it to [0, 1]"
        )
    return np.asarray(values, dtype=np.float32).reshape(tensor.shape)


def _check_shape(shape: list[int], model: ServedModel) -> None:
    expected = list(model.image_shape)
    if len(shape) != 4 or shape[1:] != expected or shape[0] < 1:
        raise RefusedError(f"{INPUT} has shape {shape}; the model takes [N, {str(expected)[1:]}")
    if shape[0] > model.limits.max_batch:
        raise RefusedError(
            f"{shape[0]} images in one request exceed the limit of {model.limits.max_batch}; "
            "send several requests"
        )


def _from_json(tensor: _Tensor) -> NDArray[Any]:
    if tensor.data is None:
        raise RefusedError(f"{INPUT} has neither data nor binary_data_size")
    try:
        values = np.asarray(tensor.data)
    except (ValueError, OverflowError):
        raise RefusedError(f"the data of {INPUT} is neither flat nor evenly nested") from None
    if values.dtype.kind not in "fiu":
        raise RefusedError(f"the data of {INPUT} holds something else than numbers")
    if values.shape not in ((math.prod(tensor.shape),), tuple(tensor.shape)):
        raise RefusedError(
            f"the data of {INPUT} has shape {list(values.shape)}, which does not fit {tensor.shape}"
        )
    return values


def _from_binary(tensor: _Tensor, size: object, tail: memoryview | None) -> NDArray[Any]:
    if tail is None:
        raise RefusedError("binary tensors need the header Inference-Header-Content-Length")
    needed = 4 * math.prod(tensor.shape)
    if tensor.data is not None or size != len(tail) or len(tail) != needed:
        raise RefusedError(
            f"{INPUT} of shape {tensor.shape} needs {needed} bytes; "
            f"binary_data_size says {size}, the body has {len(tail)}"
        )
    return np.frombuffer(bytes(tail), dtype="<f4")


def _wanted(message: _Message, model: ServedModel) -> dict[str, bool]:
    binary = message.parameters.get("binary_data_output") is True
    if not message.outputs:
        return dict.fromkeys(model.outputs, binary)
    wanted = {}
    for output in message.outputs:
        if output.name not in model.outputs:
            known = ", ".join(model.outputs)
            raise RefusedError(f"unknown output '{output.name}'; the model has {known}")
        if "classification" in output.parameters:
            raise RefusedError("the classification extension is not supported; ask for logits")
        wanted[output.name] = bool(output.parameters.get("binary_data", binary))
    return wanted


def _output(prediction: Prediction, name: str) -> NDArray[Any]:
    layer, _, kind = name.rpartition(".")
    if kind == "expert_ids":
        return prediction.expert_ids[layer]
    return prediction.weights[layer] if kind == "weights" else prediction.logits

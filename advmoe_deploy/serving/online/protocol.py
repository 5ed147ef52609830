"""Open Inference Protocol, version 2, as values: bytes to a checked request, answer to bytes.

Knows no transport, so that REST and, later, gRPC share it. The binary tensor extension is the one
stock clients use: JSON first, its length in a header of the transport, raw tensors after it.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy import __version__
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.serving.online.json_data import (
    JsonError,
    Numbers,
    json_array,
    split_data,
    stands_for_data,
)
from advmoe_deploy.serving.online.limits import Limits
from advmoe_deploy.serving.online.messages import Message, Tensor, message_from_json

INPUT = "images"
VERSION = "1"
_MESSAGE_LENGTH = 400
SERVER = {
    "name": "advmoe-deploy",
    "version": __version__,
    "extensions": ["binary_tensor_data"],
}


class RefusedError(UsageError):
    """A request that is not answered; ``status`` is its HTTP status, ``retry_s`` when to retry.

    The message is a short line of printable text, whatever names the request holds.
    """

    def __init__(self, message: str, status: int = 400, *, retry_s: int | None = None) -> None:
        super().__init__(short_line(message))
        self.status = status
        self.retry_s = retry_s


def short_line(text: str) -> str:
    """Return the beginning of ``text``, with escapes for what is not printable."""
    rest = len(text) - _MESSAGE_LENGTH
    shown = text[:_MESSAGE_LENGTH] + (f"... and {rest} more characters" if rest > 0 else "")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


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


@dataclass(frozen=True)
class InferRequest:
    """A checked request: ``images`` float32 [N, C, H, W] in [0, 1]; ``wanted`` name -> binary.

    ``timeout_s`` is how long its client waits, ``None`` if it did not say.
    """

    images: NDArray[np.float32]
    wanted: dict[str, bool]
    id: str | None = None
    timeout_s: float | None = None


@dataclass(frozen=True)
class InferResponse:
    """A body; ``json_length`` bytes of it are JSON where binary tensors follow, else ``None``."""

    body: bytes
    json_length: int | None


def read_request(
    body: bytes | bytearray, json_length: int | None, model: ServedModel
) -> InferRequest:
    """Return what ``body`` asks of ``model``.

    Raises:
        RefusedError: it is malformed, of a wrong shape or type, or outside the limits.
    """
    if json_length is not None and not 0 <= json_length <= len(body):
        raise RefusedError(f"header length {json_length} is outside the body of {len(body)} bytes")
    tail = None if json_length is None else memoryview(body)[json_length:]
    try:
        value, data = split_data(body if json_length is None else body[:json_length])
        message = message_from_json(value)
        microseconds = message.parameters.timeout or None
        return InferRequest(
            _images(message, data, tail, model),
            _wanted(message, model),
            message.id,
            microseconds and microseconds / 1e6,
        )
    except JsonError as error:
        raise RefusedError(str(error)) from None


def write_response(
    prediction: Prediction, request: InferRequest, model: ServedModel
) -> InferResponse:
    """Return the response that carries what ``request`` wanted of ``prediction``."""
    outputs, raw = [], bytearray()
    for name, binary in request.wanted.items():
        dtype = model.outputs[name][0]
        array = np.ascontiguousarray(_output(prediction, name), "<f4" if dtype == "FP32" else "<i8")
        if not np.isfinite(array).all():
            raise RefusedError(f"the model's {name} are not finite", 500)
        head = json.dumps({"name": name, "datatype": dtype, "shape": list(array.shape)})[:-1]
        if binary:
            outputs.append(f'{head}, "parameters": {{"binary_data_size": {array.nbytes}}}}}')
            raw += array.tobytes()
        else:
            outputs.append(f'{head}, "data": {json_array(array.ravel())}}}')
    message: dict[str, Any] = {"model_name": model.name, "model_version": VERSION}
    if request.id is not None:
        message["id"] = request.id
    text = f'{json.dumps(message)[:-1]}, "outputs": [{", ".join(outputs)}]}}'.encode()
    return InferResponse(text + raw, len(text) if any(request.wanted.values()) else None)


def _images(
    message: Message, data: Numbers | None, tail: memoryview | None, model: ServedModel
) -> NDArray[np.float32]:
    if [tensor.name for tensor in message.inputs] != [INPUT]:
        names = [tensor.name for tensor in message.inputs]
        raise RefusedError(f"inputs are {names}; send exactly one, called '{INPUT}'")
    (tensor,) = message.inputs
    if tensor.datatype != "FP32":
        raise RefusedError(f"{INPUT} has datatype '{tensor.datatype}'; send FP32 in [0, 1]")
    _check_shape(tensor.shape, model)
    size = tensor.parameters.binary_data_size
    if size is None and tail:
        raise RefusedError(f"{len(tail)} bytes follow the JSON; binary_data_size says nothing")
    values = _from_json(tensor, data) if size is None else _from_binary(tensor, size, tail)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise RefusedError(
            f"{INPUT} holds values that are not finite numbers in float32; scale it to [0, 1]"
        )
    if low < 0 or high > 1:
        raise RefusedError(f"{INPUT} ranges over [{low!s}, {high!s}]; scale it to [0, 1]")
    return values


def _check_shape(shape: list[int], model: ServedModel) -> None:
    expected = list(model.image_shape)
    if len(shape) != 4 or shape[1:] != expected or shape[0] < 1:
        raise RefusedError(f"{INPUT} has shape {shape}; the model takes [N, {str(expected)[1:]}")
    if shape[0] > model.limits.max_images:
        raise RefusedError(
            f"{shape[0]} images in one request exceed the limit of {model.limits.max_images}; "
            "send several requests"
        )


def _from_json(tensor: Tensor, data: Numbers | None) -> NDArray[np.float32]:
    if tensor.data is None:
        raise RefusedError(f"{INPUT} has neither data nor binary_data_size")
    if data is None or not stands_for_data(tensor.data):
        raise RefusedError(f"the data of {INPUT} must be one array of numbers")
    return data.read(tensor.shape)


def _from_binary(tensor: Tensor, size: int, tail: memoryview | None) -> NDArray[np.float32]:
    if tail is None:
        raise RefusedError("binary tensors need the header Inference-Header-Content-Length")
    needed = 4 * math.prod(tensor.shape)
    if tensor.data is not None or size != len(tail) or len(tail) != needed:
        raise RefusedError(
            f"{INPUT} of shape {tensor.shape} needs {needed} bytes; "
            f"binary_data_size says {size}, the body has {len(tail)}"
        )
    return np.frombuffer(tail, dtype="<f4").astype(np.float32).reshape(tensor.shape)


def _wanted(message: Message, model: ServedModel) -> dict[str, bool]:
    binary = message.parameters.binary_data_output
    if not message.outputs:
        return dict.fromkeys(model.outputs, binary)
    wanted = {}
    for output in message.outputs:
        if output.name not in model.outputs:
            known = ", ".join(model.outputs)
            raise RefusedError(f"unknown output '{output.name}'; the model has {known}")
        if output.parameters.classification is not None:
            raise RefusedError("the classification extension is not supported; ask for logits")
        own = output.parameters.binary_data
        wanted[output.name] = binary if own is None else own
    return wanted


def _output(prediction: Prediction, name: str) -> NDArray[Any]:
    layer, _, kind = name.rpartition(".")
    if kind == "expert_ids":
        return prediction.expert_ids[layer]
    return prediction.weights[layer] if kind == "weights" else prediction.logits

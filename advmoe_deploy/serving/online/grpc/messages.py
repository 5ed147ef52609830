"""Messages of inference over gRPC, from bytes to checked requests, and answers to bytes.

The messages are those of NVIDIA's client, ``tritonclient``.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc  # noqa: F401, RUF100 - without it the next import fails by another error
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.serving.online.grpc.wire import Cut, WireError, cut
from advmoe_deploy.serving.online.protocol import (
    INPUT,
    InferRequest,
    RefusedError,
    ServedModel,
    check_tensor,
    images_from_bytes,
    in_range,
    output_of,
    require_input,
    require_output,
)

_SHARED_MEMORY = "shared_memory_region"


@dataclass(frozen=True)
class Asked:
    """A request, parsed but for its numbers, which are in ``parts``."""

    message: Any
    parts: Cut
    size: int  # bytes

    def clear(self) -> None:
        """Let go of the bytes."""
        self.parts.raw.clear()
        self.parts.contents.clear()


def asked_of(serialised: bytes) -> Asked:
    """Return what a serialised ``ModelInferRequest`` asks for, unchecked.

    Raises:
        RefusedError: it is malformed.
    """
    try:
        parts = cut(serialised)
    except WireError as error:
        raise RefusedError(str(error)) from None
    message = parsed(service_pb2.ModelInferRequest, bytes(parts.envelope))
    return Asked(message, parts, len(serialised))


def parsed(kind: Any, serialised: bytes) -> Any:
    """Return a message of ``kind``, or raise :class:`RefusedError` if the bytes are none."""
    try:
        return kind.FromString(serialised)
    except DecodeError:
        raise RefusedError(f"the message is no {kind.DESCRIPTOR.name}") from None


def read_request(asked: Asked, model: ServedModel, remaining_s: float | None) -> InferRequest:
    """Return what is asked of ``model`` by a client that waits ``remaining_s``, if it said so.

    Raises:
        RefusedError: it is of a wrong shape or type, or outside the limits.
    """
    message = asked.message
    for each in (*message.inputs, *message.outputs):
        if _SHARED_MEMORY in each.parameters:
            raise RefusedError("shared memory is not offered; send tensors in the request")
    require_input([tensor.name for tensor in message.inputs])
    (tensor,) = message.inputs
    shape = list(tensor.shape)
    check_tensor(tensor.datatype, shape, model)
    images = in_range(images_from_bytes(_numbers(asked.parts, 4 * math.prod(shape)), shape))
    times = (_timeout_s(message), remaining_s)
    return InferRequest(
        images,
        dict.fromkeys(_wanted(message, model), True),
        message.id,
        min((each for each in times if each is not None), default=None),
    )


def write_response(prediction: Prediction, request: InferRequest, model: ServedModel) -> bytes:
    """Return the serialised response that carries what ``request`` wanted of ``prediction``."""
    response = service_pb2.ModelInferResponse(
        model_name=model.name, model_version=model.version, id=request.id
    )
    for name in request.wanted:
        array = output_of(prediction, name, model)
        response.outputs.add(name=name, datatype=model.outputs[name][0], shape=array.shape)
        response.raw_output_contents.append(array.tobytes())
    return bytes(response.SerializeToString())


def _numbers(parts: Cut, needed: int) -> memoryview:
    """Return the bytes of the one input, of which it needs so many."""
    given = [*parts.raw, *(each for each in parts.contents if each is not None)]
    if len(given) != 1:
        raise RefusedError(
            f"{INPUT} is there {len(given)} times; send it once, in raw_input_contents or contents"
        )
    if len(given[0]) != needed:
        raise RefusedError(f"{INPUT} of its shape needs {needed} bytes; it has {len(given[0])}")
    return given[0]


def _timeout_s(message: Any) -> float | None:
    """Return the parameter ``timeout``, which is in microseconds, as Triton's; 0 is none."""
    if "timeout" not in message.parameters:
        return None
    parameter = message.parameters["timeout"]
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in {"int64_param", "uint64_param"} or getattr(parameter, kind) < 0:
        raise RefusedError("the parameter timeout must be a number of microseconds")
    return getattr(parameter, kind) / 1e6 or None


def _wanted(message: Any, model: ServedModel) -> Iterable[str]:
    for output in message.outputs:
        require_output(output.name, model)
        if "classification" in output.parameters:
            raise RefusedError("the classification extension is not supported; ask for logits")
    return [output.name for output in message.outputs] or model.outputs

"""Messages of inference over gRPC, from bytes to checked requests, and answers to bytes.

The messages are those of NVIDIA's client, ``tritonclient``.
"""

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
    Wanted,
    bytes_of,
    check_tensor,
    images_from_bytes,
    in_range,
    output_of,
    require_input,
    require_output,
    tensor_bytes,
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
    datatype, shape = tensor.datatype, list(tensor.shape)
    check_tensor(datatype, shape, model)
    if datatype != "FP32" and asked.parts.contents[0] is not None:
        raise RefusedError(f"{INPUT} has datatype {datatype}; send it in raw_input_contents")
    numbers = _numbers(asked.parts, bytes_of(datatype, shape))
    images = in_range(images_from_bytes(numbers, datatype, shape))
    times = (_timeout_s(message), remaining_s)
    return InferRequest(
        images,
        _wanted(message, model),
        message.id,
        min((each for each in times if each is not None), default=None),
    )


def write_response(prediction: Prediction, request: InferRequest, model: ServedModel) -> bytes:
    """Return the serialised response that carries what ``request`` wanted of ``prediction``."""
    response = service_pb2.ModelInferResponse(
        model_name=model.name, model_version=model.version, id=request.id
    )
    for name, wanted in request.wanted.items():
        datatype, array = output_of(prediction, name, wanted, model)
        response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        response.raw_output_contents.append(tensor_bytes(array))
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
    return _whole(message.parameters, "timeout") / 1e6 or None


def _wanted(message: Any, model: ServedModel) -> dict[str, Wanted]:
    wanted = {}
    for output in message.outputs:
        classes = _whole(output.parameters, "classification")
        require_output(output.name, classes, model)
        wanted[output.name] = Wanted(True, classes)
    return wanted or dict.fromkeys(model.outputs, Wanted(True))


def _whole(parameters: Any, name: str) -> int:
    """Return a parameter that is a whole number from 0 on; 0 if it is not there."""
    if name not in parameters:
        return 0
    kind = parameters[name].WhichOneof("parameter_choice")
    if kind not in {"int64_param", "uint64_param"} or getattr(parameters[name], kind) < 0:
        raise RefusedError(f"the parameter {name} must be a whole number, from 0 on")
    return int(getattr(parameters[name], kind))

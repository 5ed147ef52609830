"""Bodies of inference requests and their answers: JSON, and the binary tensors behind it.

The binary tensor extension is the one stock clients use: JSON first, its length in a header, raw
tensors after it.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.serving.online.http.json_data import (
    JsonError,
    Numbers,
    json_array,
    split_data,
    stands_for_data,
)
from advmoe_deploy.serving.online.http.messages import Message, Tensor, message_from_json
from advmoe_deploy.serving.online.protocol import (
    INPUT,
    InferRequest,
    RefusedError,
    ServedModel,
    Wanted,
    bytes_of,
    check_tensor,
    images_from_bytes,
    images_from_numbers,
    in_range,
    output_of,
    require_input,
    require_output,
    tensor_bytes,
)

# How files of the usual formats begin, which no JSON does, and what is said of one.
_IMAGE_FILES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*")
_IMAGE_FILE = (
    "the body is an image file, and this address takes tensors; POST the file to the one that ends "
    "in /image instead of /infer"
)


@dataclass(frozen=True)
class InferResponse:
    """A body; ``json_length`` bytes of it are JSON where binary tensors follow, else ``None``.

    Its ``encoding``, if any, was put around the whole.
    """

    body: bytes
    json_length: int | None
    encoding: bytes | None = None


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
        is_image = bytes(body[:4]).startswith(_IMAGE_FILES)
        raise RefusedError(_IMAGE_FILE if is_image else str(error)) from None


def write_response(
    prediction: Prediction, request: InferRequest, model: ServedModel
) -> InferResponse:
    """Return the response that carries what ``request`` wanted of ``prediction``."""
    outputs, raw = [], bytearray()
    for name, wanted in request.wanted.items():
        dtype, array = output_of(prediction, name, wanted, model)
        head = json.dumps({"name": name, "datatype": dtype, "shape": list(array.shape)})[:-1]
        if wanted.binary:
            tensor = tensor_bytes(array)
            outputs.append(f'{head}, "parameters": {{"binary_data_size": {len(tensor)}}}}}')
            raw += tensor
        else:
            outputs.append(f'{head}, "data": {json_array(array.ravel())}}}')
    message: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
    if request.id is not None:
        message["id"] = request.id
    text = f'{json.dumps(message)[:-1]}, "outputs": [{", ".join(outputs)}]}}'.encode()
    binary = any(wanted.binary for wanted in request.wanted.values())
    return InferResponse(text + raw, len(text) if binary else None)


def _images(
    message: Message, data: Numbers | None, tail: memoryview | None, model: ServedModel
) -> NDArray[np.float32]:
    require_input([tensor.name for tensor in message.inputs])
    (tensor,) = message.inputs
    check_tensor(tensor.datatype, tensor.shape, model)
    size = tensor.parameters.binary_data_size
    if size is None and tail:
        raise RefusedError(f"{len(tail)} bytes follow the JSON; binary_data_size says nothing")
    return in_range(_from_json(tensor, data) if size is None else _from_binary(tensor, size, tail))


def _from_json(tensor: Tensor, data: Numbers | None) -> NDArray[np.float32]:
    if tensor.data is None:
        raise RefusedError(f"{INPUT} has neither data nor binary_data_size")
    if data is None or not stands_for_data(tensor.data):
        raise RefusedError(f"the data of {INPUT} must be one array of numbers")
    return images_from_numbers(data.read(tensor.shape), tensor.datatype, tensor.shape)


def _from_binary(tensor: Tensor, size: int, tail: memoryview | None) -> NDArray[np.float32]:
    if tail is None:
        raise RefusedError("binary tensors need the header Inference-Header-Content-Length")
    needed = bytes_of(tensor.datatype, tensor.shape)
    if tensor.data is not None or size != len(tail) or len(tail) != needed:
        raise RefusedError(
            f"{INPUT} of shape {tensor.shape} needs {needed} bytes; "
            f"binary_data_size says {size}, the body has {len(tail)}"
        )
    return images_from_bytes(tail, tensor.datatype, tensor.shape)


def _wanted(message: Message, model: ServedModel) -> dict[str, Wanted]:
    binary = message.parameters.binary_data_output
    if not message.outputs:
        return dict.fromkeys(model.outputs, Wanted(binary))
    wanted = {}
    for output in message.outputs:
        classes, own = output.parameters.classification or 0, output.parameters.binary_data
        require_output(output.name, classes, model)
        wanted[output.name] = Wanted(binary if own is None else own, classes)
    return wanted

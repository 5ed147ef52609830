"""Open Inference Protocol, version 2, as values: what every transport checks and answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy import __version__
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import UsageError
from advmoe_deploy.reports import ParityReport
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.serving.online.limits import Limits

INPUT = "images"
VERSION = "1"
_MESSAGE_LENGTH = 400
SERVER = {
    "name": "advmoe-deploy",
    "version": __version__,
    "extensions": ["binary_tensor_data", "classification", "model_configuration", "statistics"],
}
# Datatypes of images, and what a number of each is as float32 in [0, 1].
_STORED: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "FP16": np.dtype("<f2"),
    "UINT8": np.dtype("u1"),
}
_UINT8_ONE = np.float32(255)
LOGITS = "logits"


NO_MEMORY = "overloaded: other requests hold the memory"
# The status of a request whose client left before its answer; nobody sees it but the metrics.
CLIENT_LEFT = 499


class RefusedError(UsageError):
    """A request that is not answered; ``status`` is its HTTP status, ``retry_s`` when to retry.

    The message is a short line of printable text, whatever names the request holds.
    """

    def __init__(self, message: str, status: int = 400, *, retry_s: int | None = None) -> None:
        super().__init__(short_line(message))
        self.status = status
        self.retry_s = retry_s


class ClientLeftError(RefusedError):
    """A request whose client left before its answer."""

    def __init__(self) -> None:
        super().__init__("the client has left", CLIENT_LEFT)


class NotReadyError(RefusedError):
    """A request to a server that is starting or stopping; another one may answer it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 503, retry_s=1)


def short_line(text: str) -> str:
    """Return the beginning of ``text``, with escapes for what is not printable."""
    rest = len(text) - _MESSAGE_LENGTH
    shown = text[:_MESSAGE_LENGTH] + (f"... and {rest} more characters" if rest > 0 else "")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


@dataclass(frozen=True)
class ServedModel:
    """Name, tensors and limits of a model on offer; ``outputs`` maps names to (dtype, shape).

    ``labels`` are the names of its classes, if they have names; ``family``, ``identity`` and
    ``decoding`` are those of its bundle, whose export ``recorded`` how its images were routed.
    """

    name: str
    image_shape: tuple[int, int, int]
    outputs: dict[str, tuple[str, tuple[int, ...]]]
    identity: str
    decoding: Decoding
    recorded: ParityReport
    limits: Limits = field(default_factory=Limits)
    version: str = VERSION
    labels: tuple[str, ...] = ()
    family: str = ""

    @property
    def longest(self) -> int:
        """Bytes of the images of the largest request that it answers, as float32."""
        most = 4 * math.prod(self.image_shape) * self.limits.max_images
        return min(self.limits.max_body, most)

    def metadata(self, versions: Sequence[str]) -> dict[str, Any]:
        """Return the model metadata response; ``versions`` are those of its name."""
        outputs = [
            {"name": name, "datatype": dtype, "shape": [-1, *shape]}
            for name, (dtype, shape) in self.outputs.items()
        ]
        return {
            "name": self.name,
            "versions": [*versions],
            "platform": "advmoe-deploy",
            "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *self.image_shape]}],
            "outputs": outputs,
        }


def served_model(
    bundle: Bundle,
    name: str | None = None,
    limits: Limits | None = None,
    version: str = VERSION,
) -> ServedModel:
    """Return how ``bundle`` is offered; by default under the name of its model family."""
    manifest = bundle.manifest
    spec = manifest.model
    outputs: dict[str, tuple[str, tuple[int, ...]]] = {LOGITS: ("FP32", (spec.num_classes,))}
    for route in manifest.plan.routes:
        shape = tuple(int(size) for size in route.shape[1:])
        outputs |= {route.expert_ids: ("INT64", shape), route.weights: ("FP32", shape)}
    return ServedModel(
        name or spec.family,
        spec.image_shape,
        outputs,
        bundle.identity,
        manifest.decoding,
        manifest.parity,
        limits or Limits(),
        version,
        manifest.class_names,
        spec.family,
    )


@dataclass(frozen=True)
class Wanted:
    """Form in which an output is wanted: ``binary`` or as JSON.

    With ``classes``, it is so many of the best ones as text instead of its numbers.
    """

    binary: bool
    classes: int = 0


@dataclass(frozen=True)
class InferRequest:
    """A checked request: ``images`` float32 [N, C, H, W] in [0, 1]; ``wanted`` outputs by name.

    ``timeout_s`` is how long its client waits, ``None`` if it did not say.
    """

    images: NDArray[np.float32]
    wanted: dict[str, Wanted]
    id: str | None = None
    timeout_s: float | None = None


def require_input(names: list[str]) -> None:
    """Raise :class:`RefusedError` unless the one input is there, under its ``names``."""
    if names != [INPUT]:
        raise RefusedError(f"inputs are {names}; send exactly one, called '{INPUT}'")


def check_tensor(datatype: str, shape: list[int], model: ServedModel) -> None:
    """Raise :class:`RefusedError` if no images can have this datatype and ``shape``."""
    if datatype not in _STORED:
        raise RefusedError(
            f"{INPUT} has datatype '{datatype}'; send FP32 or FP16 in [0, 1], or UINT8"
        )
    expected = list(model.image_shape)
    if len(shape) != 4 or shape[1:] != expected or shape[0] < 1:
        raise RefusedError(f"{INPUT} has shape {shape}; the model takes [N, {str(expected)[1:]}")
    if shape[0] > model.limits.max_images:
        raise RefusedError(
            f"{shape[0]} images in one request exceed the limit of {model.limits.max_images}; "
            "send several requests"
        )
    if datatype != "FP32" and 4 * math.prod(shape) > model.limits.max_body:
        raise RefusedError(
            f"{shape[0]} images of {datatype} exceed the limit of {model.limits.max_body} bytes "
            "as float32; send several requests"
        )


def bytes_of(datatype: str, shape: list[int]) -> int:
    """Return how many bytes a checked tensor has."""
    return _STORED[datatype].itemsize * math.prod(shape)


def images_from_bytes(raw: memoryview, datatype: str, shape: list[int]) -> NDArray[np.float32]:
    """Return the images in ``raw``, little endian, whose length fits ``shape``."""
    values: NDArray[Any] = np.frombuffer(raw, dtype=_STORED[datatype]).reshape(shape)
    if datatype == "UINT8":
        images: NDArray[np.float32] = np.divide(values, _UINT8_ONE, dtype=np.float32)
        return images
    return values.astype(np.float32)


def images_from_numbers(
    values: NDArray[np.float32], datatype: str, shape: list[int]
) -> NDArray[np.float32]:
    """Return the images whose pixels were written as numbers of ``datatype``."""
    if datatype == "FP16":
        raise RefusedError("FP16 is for binary tensors; send numbers as FP32")
    if datatype == "UINT8":
        if not (np.isfinite(values).all() and (values == np.clip(np.rint(values), 0, 255)).all()):
            raise RefusedError(f"{INPUT} has datatype UINT8; its numbers are whole, from 0 to 255")
        values /= _UINT8_ONE
    return values.reshape(shape)


def in_range(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``images``, or raise :class:`RefusedError` if they are not within [0, 1]."""
    low, high = images.min(), images.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise RefusedError(
            f"{INPUT} holds values that are not finite numbers in float32; scale it to [0, 1]"
        )
    if low < 0 or high > 1:
        raise RefusedError(f"{INPUT} ranges over [{low!s}, {high!s}]; scale it to [0, 1]")
    return images


def require_output(name: str, classes: int, model: ServedModel) -> None:
    """Raise :class:`RefusedError` unless ``model`` has this output, and can tell its classes."""
    if name not in model.outputs:
        known = ", ".join(model.outputs)
        raise RefusedError(f"unknown output '{name}'; the model has {known}")
    if classes < 0:
        raise RefusedError(f"classification is {classes}; ask for 1 class or more")
    if classes and name != LOGITS:
        raise RefusedError(f"'{name}' is of no classes; ask for the classification of {LOGITS}")


def output_of(
    prediction: Prediction, name: str, wanted: Wanted, model: ServedModel
) -> tuple[str, NDArray[Any]]:
    """Return datatype and values of an output; text, of datatype BYTES, is an array of strings.

    A class is text as Triton writes it: ``VALUE:INDEX:LABEL``, the best first.

    Raises:
        RefusedError: it is not finite (500).
    """
    values = _values_of(prediction, name)
    if wanted.classes:
        return "BYTES", _best(values, wanted.classes, model.labels)
    return model.outputs[name][0], values


def tensor_bytes(values: NDArray[Any]) -> bytes:
    """Return values as they travel in binary: little endian, texts behind their lengths."""
    if values.dtype != object:
        return values.tobytes()
    texts = [text.encode("utf-8", "backslashreplace") for text in values.ravel()]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def _best(logits_NC: NDArray[Any], count: int, labels: Sequence[str]) -> NDArray[Any]:
    order_NK = np.argsort(-logits_NC, axis=1, kind="stable")[:, :count]
    texts = [
        [
            ":".join((str(logits_C[index]), str(index), *labels[index : index + 1]))
            for index in order_K
        ]
        for logits_C, order_K in zip(logits_NC, order_NK, strict=True)
    ]
    return np.array(texts, dtype=object)


def _values_of(prediction: Prediction, name: str) -> NDArray[Any]:
    layer, _, kind = name.rpartition(".")
    if kind == "expert_ids":
        return np.ascontiguousarray(prediction.expert_ids[layer], "<i8")
    values = prediction.weights[layer] if kind == "weights" else prediction.logits
    if not np.isfinite(values).all():
        raise RefusedError(f"the model's {name} are not finite", 500)
    return np.ascontiguousarray(values, "<f4")

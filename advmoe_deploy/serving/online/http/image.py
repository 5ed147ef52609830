"""The endpoint for image files: decoded as the bundle says, answered in words.

Shapes: C classes.
"""

import asyncio
import io
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

import numpy as np
from numpy.typing import NDArray
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.decode import decode, known_formats
from advmoe_deploy.errors import DataError, MachineError
from advmoe_deploy.runtime.routing import softmax
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.serving.online.http.guard import HEADERS, RECORD
from advmoe_deploy.serving.online.http.packing import UnreadError
from advmoe_deploy.serving.online.http.reading import GONE, left, never, read_body
from advmoe_deploy.serving.online.job import Times
from advmoe_deploy.serving.online.limits import BYTES_OF_PIXEL, Hold
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.protocol import (
    InferRequest,
    RefusedError,
    ServedModel,
    short_line,
)
from advmoe_deploy.serving.online.service import Arrival, Service

TOP = 5  # classes of an answer unless the request says how many
_PLAIN_BYTES = "application/octet-stream"
# How long a decoder waits for the event loop to give it memory; longer only if that has ended.
_LOOP_S = 30.0


class Image:
    """Reads one image file, has it answered, and says what it shows and which way it went."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            RefusedError: it is not answered, and why.
        """
        began, record = time.perf_counter(), scope[RECORD]
        record.infers, record.images = True, 1
        service = self._models.find(**scope["path_params"], to_infer=True)
        with service.counted(began, record, lambda: left(scope)) as times:
            service.require_warm()
            with service.budget.hold() as hold:
                answer = await self._answer(service, scope, receive, hold, began, times)
            await JSONResponse(answer)(scope, receive, send)

    async def _answer(
        self,
        service: Service,
        scope: Scope,
        receive: Receive,
        hold: Hold,
        began: float,
        times: Times,
    ) -> dict[str, Any]:
        headers, is_gone = scope[HEADERS], scope.get(GONE, never)
        _require_image(headers)
        top = _top(scope["query_string"], len(service.model.labels))
        with Arrival(service, times) as arrival:
            images, size, read = await self._request(arrival, receive, headers, hold, is_gone)
            decoded = time.perf_counter()
            rest_s = max(0.0, service.model.limits.timeout_s - (decoded - read))
            request = InferRequest(images, {}, timeout_s=rest_s)
            prediction = await service.predict(request, is_gone, arrival)
        answered = time.perf_counter()
        times.read, times.decode = read - began, decoded - read
        told = {"read": times.read, "decode": times.decode, "answer": answered - decoded}
        answer = {
            **described(prediction, service.model, top),
            "image": {"width": size[0], "height": size[1]},
            "timing_ms": {name: round(1e3 * seconds, 3) for name, seconds in told.items()},
        }
        times.write = time.perf_counter() - answered
        return answer

    async def _request(
        self,
        arrival: Arrival,
        receive: Receive,
        headers: Mapping[bytes, bytes],
        hold: Hold,
        is_gone: Callable[[], bool],
    ) -> tuple[NDArray[np.float32], tuple[int, int], float]:
        """Return the one image, its file's size, and when that was read; the file is let go of."""
        body = await read_body(self._models, receive, headers, 1, hold, arrival)
        if not body:
            raise RefusedError("the body is empty; send the file itself (curl --data-binary @FILE)")
        read = time.perf_counter()
        return *await self._decoded(arrival.service, body, hold, is_gone), read

    async def _decoded(
        self,
        service: Service,
        body: bytes | bytearray,
        hold: Hold,
        is_gone: Callable[[], bool],
    ) -> tuple[NDArray[np.float32], tuple[int, int]]:
        """Return the one image [1, C, H, W] in ``body``, and width and height of its file."""
        loop = asyncio.get_running_loop()

        async def charge(pixels: int) -> None:
            self._models.charge(hold, 2 * len(body) + BYTES_OF_PIXEL * pixels)

        def admit(pixels: int) -> None:
            limit = service.model.limits.max_pixels
            if pixels > limit:
                raise RefusedError(
                    f"the image has {pixels} pixels; the server takes {limit} (--memory)", 413
                )
            asyncio.run_coroutine_threadsafe(charge(pixels), loop).result(timeout=_LOOP_S)

        def work() -> tuple[NDArray[np.float32], tuple[int, int]]:
            image = decode(io.BytesIO(body), "the image", service.model.decoding, admit)
            return to_float(image.pixels[None]), image.original

        try:
            images, size = await service.decode(work, is_gone)
        except DataError as error:
            raise RefusedError(str(error)) from None
        except MachineError as error:
            raise RefusedError(str(error), 503, retry_s=1) from None
        hold.shrink(images.nbytes)
        return images, size


def described(prediction: Prediction, model: ServedModel, top: int) -> dict[str, Any]:
    """Return what the ``prediction`` of one image says: ``top`` classes, and the experts.

    Raises:
        RefusedError: its logits are not finite (500).
    """
    logits_C = prediction.logits[0].astype(np.float64)
    if not np.isfinite(logits_C).all():
        raise RefusedError("the model's logits are not finite", 500)
    (shares_C,) = softmax(prediction.logits[:1])
    order_C = np.argsort(-logits_C, kind="stable")
    classes = [
        {
            "label_id": int(label),
            "label": model.labels[label],
            "probability": float(shares_C[label]),
        }
        for label in order_C[:top]
    ]
    lead = float(logits_C[order_C[0]] - logits_C[order_C[1]]) if len(order_C) > 1 else None
    return {
        "model_name": model.name,
        "model_version": model.version,
        **classes[0],
        "top": classes,
        "logit_margin": lead,
        "routes": [_route(prediction, layer) for layer in prediction.expert_ids],
    }


def _route(prediction: Prediction, layer: str) -> dict[str, Any]:
    margins = prediction.margins.get(layer)
    return {
        "layer": layer,
        "expert_ids": prediction.expert_ids[layer][0].tolist(),
        "weights": np.nan_to_num(prediction.weights[layer][0]).tolist(),
        "margin": None if margins is None else np.nan_to_num(margins[0]).tolist(),
    }


def _require_image(headers: Mapping[bytes, bytes]) -> None:
    given = headers.get(b"content-type", _PLAIN_BYTES.encode()).decode("latin-1")
    kind = given.partition(";")[0].strip().lower()
    if not kind.startswith("image/") and kind != _PLAIN_BYTES:
        raise UnreadError(
            f"content-type '{kind}' is no image; send the file itself (curl --data-binary @FILE) "
            f"as {_PLAIN_BYTES} or image/...: {', '.join(known_formats())} are read",
            415,
        )


def _top(query: bytes, classes: int) -> int:
    asked = parse_qs(query.decode("latin-1"), keep_blank_values=True)
    for name in asked.keys() - {"top"}:
        shown = short_line(name)
        raise UnreadError(f"'{shown}' is unknown in the address; ?top=N is all it takes")
    (text,) = asked.get("top", [str(min(TOP, classes))])[:1]
    if not (text.isascii() and text.isdigit() and len(text) < 7 and 1 <= int(text) <= classes):
        raise UnreadError(f"top is '{text}'; it must be a number from 1 to {classes}")
    return int(text)

"""The endpoint that answers inference requests, as an ASGI application.

It is where the time of a small request goes, so nothing stands between it and the connection.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from starlette.types import Receive, Scope, Send

from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.serving.online.http.body import InferResponse, read_request, write_response
from advmoe_deploy.serving.online.http.guard import HEADERS, RECORD
from advmoe_deploy.serving.online.http.json_data import MAX_ENVELOPE
from advmoe_deploy.serving.online.http.packing import packed, wants_gzip
from advmoe_deploy.serving.online.http.reading import GONE, left, never, read_body
from advmoe_deploy.serving.online.job import Times
from advmoe_deploy.serving.online.limits import COPIES_OF_BINARY, COPIES_OF_JSON, Hold
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.protocol import (
    ClientLeftError,
    InferRequest,
    RefusedError,
    ServedModel,
)
from advmoe_deploy.serving.online.service import FEW_IMAGES, SMALL_BODY, Arrival, Service

_JSON_LENGTH = "Inference-Header-Content-Length"
_JSON_LENGTH_KEY = _JSON_LENGTH.lower().encode()


class Infer:
    """Reads a body within the limits, has it answered, and writes the answer."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            RefusedError: it is not answered, and why.
        """
        began, record = time.perf_counter(), scope[RECORD]
        record.infers = True
        service = self._models.find(**scope["path_params"], to_infer=True)
        with service.counted(began, record, lambda: left(scope)) as times:
            service.require_warm()
            with service.budget.hold() as hold:
                answer = await self._answer(service, scope, receive, hold, times)
            await _send(send, answer)

    async def _answer(
        self, service: Service, scope: Scope, receive: Receive, hold: Hold, times: Times
    ) -> InferResponse:
        is_gone = scope.get(GONE, never)
        with Arrival(service, times) as arrival:
            request = await self._request(arrival, receive, scope[HEADERS], hold, is_gone)
            scope[RECORD].images = len(request.images)
            prediction = await service.predict(request, is_gone, arrival)
        began = time.perf_counter()
        answer = await service.run(
            len(request.images) <= FEW_IMAGES,
            lambda: _written(prediction, request, service.model, scope[HEADERS]),
        )
        times.write = time.perf_counter() - began
        return answer

    async def _request(
        self,
        arrival: Arrival,
        receive: Receive,
        headers: Mapping[bytes, bytes],
        hold: Hold,
        is_gone: Callable[[], bool],
    ) -> InferRequest:
        began, service = time.perf_counter(), arrival.service
        json_length = _json_length(headers)
        is_json = json_length is None or json_length > MAX_ENVELOPE
        copies = COPIES_OF_JSON if is_json else COPIES_OF_BINARY
        body = await read_body(self._models, receive, headers, copies, hold, arrival)

        def read() -> InferRequest:
            if is_gone():
                raise ClientLeftError
            return read_request(body, json_length, service.model)

        request = await service.run(len(body) <= SMALL_BODY, read)
        self._models.charge(hold, request.images.nbytes)  # of UINT8 there is more now
        hold.shrink(request.images.nbytes)
        arrival.times.read = time.perf_counter() - began
        return request


def _written(
    prediction: Prediction,
    request: InferRequest,
    model: ServedModel,
    headers: Mapping[bytes, bytes],
) -> InferResponse:
    answer = write_response(prediction, request, model)
    if not wants_gzip(headers.get(b"accept-encoding", b""), len(answer.body)):
        return answer
    return replace(answer, body=packed(answer.body), encoding=b"gzip")


def _json_length(headers: Mapping[bytes, bytes]) -> int | None:
    value = headers.get(_JSON_LENGTH_KEY)
    if value is None:
        return None
    if not (value.isdigit() and len(value) < 20):
        shown = value.decode("latin-1")
        raise RefusedError(f"{_JSON_LENGTH} is '{shown}'; it must be a number of bytes")
    return int(value)


async def _send(send: Send, answer: InferResponse) -> None:
    headers = [(b"content-length", b"%d" % len(answer.body))]
    if answer.json_length is None:
        headers.append((b"content-type", b"application/json"))
    else:
        headers.append((b"content-type", b"application/octet-stream"))
        headers.append((_JSON_LENGTH_KEY, b"%d" % answer.json_length))
    if answer.encoding is not None:
        headers.append((b"content-encoding", answer.encoding))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})

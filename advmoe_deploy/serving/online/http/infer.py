"""The endpoint that answers inference requests, as an ASGI application.

It is where the time of a small request goes, so nothing stands between it and the connection.
"""

import time
from collections.abc import Callable, Mapping

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from advmoe_deploy.serving.online.http.body import InferResponse, read_request, write_response
from advmoe_deploy.serving.online.http.connection import GONE
from advmoe_deploy.serving.online.http.guard import HEADERS
from advmoe_deploy.serving.online.http.json_data import MAX_ENVELOPE
from advmoe_deploy.serving.online.limits import COPIES_OF_BINARY, COPIES_OF_JSON, Hold
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.protocol import InferRequest, RefusedError
from advmoe_deploy.serving.online.service import (
    CLIENT_LEFT,
    FEW_IMAGES,
    SMALL_BODY,
    Arrival,
    Service,
)
from advmoe_deploy.serving.online.turns import Turns

_JSON_LENGTH = "Inference-Header-Content-Length"
_JSON_LENGTH_KEY = _JSON_LENGTH.lower().encode()


# How many small requests are read before others, health among them, have their turn.
_IN_A_TURN = 16


class UnreadError(RefusedError):
    """A request refused before its body was read to the end."""


class Infer:
    """Reads a body within the limits, has it answered, and writes the answer."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._turns = Turns(_IN_A_TURN)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            RefusedError: it is not answered, and why.
        """
        began, status = time.perf_counter(), 500
        await self._turns.take()
        service = self._models.find(**scope["path_params"])
        try:
            service.require_warm()
            with service.budget.hold() as hold:
                answer = await self._answer(service, scope, receive, hold)
            await _send(send, answer)
            status = 200
        except RefusedError as error:
            status = error.status
            raise
        except ClientDisconnect:
            status = CLIENT_LEFT
            raise
        finally:
            service.metrics.request(status, time.perf_counter() - began)

    async def _answer(
        self, service: Service, scope: Scope, receive: Receive, hold: Hold
    ) -> InferResponse:
        is_gone = scope.get(GONE, _never)
        with Arrival(service) as arrival:
            request = await self._request(service, receive, scope[HEADERS], hold, is_gone)
            prediction = await service.predict(request, is_gone, arrival)
        began = time.perf_counter()
        answer = await service.run(
            len(request.images) <= FEW_IMAGES,
            lambda: write_response(prediction, request, service.model),
        )
        service.metrics.stage("write", time.perf_counter() - began)
        return answer

    async def _request(
        self,
        service: Service,
        receive: Receive,
        headers: Mapping[bytes, bytes],
        hold: Hold,
        is_gone: Callable[[], bool],
    ) -> InferRequest:
        began = time.perf_counter()
        json_length = _json_length(headers)
        is_json = json_length is None or json_length > MAX_ENVELOPE
        body = await self._read(receive, headers, is_json, hold)

        def read() -> InferRequest:
            if is_gone():
                raise RefusedError("the client has left", CLIENT_LEFT)
            return read_request(body, json_length, service.model)

        request = await service.run(len(body) <= SMALL_BODY, read)
        hold.shrink(request.images.nbytes)
        service.metrics.stage("read", time.perf_counter() - began)
        return request

    async def _read(
        self, receive: Receive, headers: Mapping[bytes, bytes], is_json: bool, hold: Hold
    ) -> bytes | bytearray:
        limit = self._models.limits.max_body
        encoding = headers.get(b"content-encoding", b"identity")
        if encoding != b"identity":
            name = encoding.decode("latin-1")
            raise UnreadError(f"content-encoding '{name}' is not supported; send it plain", 415)
        copies = COPIES_OF_JSON if is_json else COPIES_OF_BINARY
        self._admit(int(headers.get(b"content-length", 0)), limit, copies, hold)
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece: bytes = message["body"]
            if not body and not message["more_body"]:
                self._admit(len(piece), limit, copies, hold)
                return piece
            body += piece
            self._admit(len(body), limit, copies, hold)
            if not message["more_body"]:
                return body

    def _admit(self, length: int, limit: int, copies: int, hold: Hold) -> None:
        if length > limit:
            raise UnreadError(
                f"the body exceeds the limit of {limit} bytes; send fewer images", 413
            )
        if not self._models.reserve(hold, copies * length):
            raise UnreadError("overloaded: other requests hold the memory", 503, retry_s=1)


def _never() -> bool:
    return False


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
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})

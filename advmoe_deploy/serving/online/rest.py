"""REST service of the Open Inference Protocol: FastAPI, known to this module alone."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.serving.online.protocol import (
    SERVER,
    VERSION,
    InferResponse,
    RefusedError,
    ServedModel,
    read_request,
    short_line,
    write_response,
)
from advmoe_deploy.serving.online.server import run_until_stopped, server_of

_JSON_LENGTH = "Inference-Header-Content-Length"
_PROBED = ["GET", "HEAD"]
_LINGER_S = 2.0
_LINGER_BYTES = 256 << 20

T = TypeVar("T")


class Service:
    """One model and the one thread that runs it, so that everything else answers meanwhile."""

    def __init__(self, model: ServedModel, runner: Runner) -> None:
        self.model = model
        self.ready = False
        self.failure: BaseException | None = None
        self._runner = runner
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="infer")

    async def warm_up(self) -> None:
        """Run one image through the model; ``ready`` or ``failure`` says how it went."""
        image = np.zeros((1, *self.model.image_shape), dtype=np.float32)
        try:
            await self._run(lambda: self._runner.infer(image))
            self.ready = True
        except Exception as error:  # noqa: BLE001, RUF100 - kept for whoever started the server
            self.failure = error

    async def infer(self, body: bytearray, json_length: int | None) -> InferResponse:
        """Return the response to one request."""
        if not self.ready:
            raise RefusedError("the model is not ready; ask /v2/health/ready", 503)
        return await self._run(lambda: self._answer(body, json_length))

    def close(self) -> None:
        """Wait for the running inference and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _answer(self, body: bytearray, json_length: int | None) -> InferResponse:
        request = read_request(body, json_length, self.model)
        return write_response(self._runner.infer(request.images), request, self.model)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def build_app(service: Service, on_warm: Callable[[], None] | None = None) -> FastAPI:
    """Return the application; ``on_warm`` is called when the warm-up has ended, well or not."""

    async def warm_up() -> None:
        await service.warm_up()
        if on_warm is not None:
            on_warm()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(warm_up())
        yield
        await warming
        service.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_health(app, service)
    for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        _add_model(app, service, prefix)
    return app


def run_app(
    service: Service, listener: socket.socket, announce: Callable[[], None], *, keep_alive: int
) -> None:
    """Serve on ``listener`` until SIGTERM (returns) or SIGINT (KeyboardInterrupt), then drain.

    A connection without a request is closed after ``keep_alive`` seconds.

    Raises:
        Exception: whatever the warm-up raised.
    """

    def on_warm() -> None:
        if service.failure is None:
            announce()
        else:
            server.should_exit = True

    server = server_of(build_app(service, on_warm), keep_alive)
    run_until_stopped(server, listener)
    if service.failure is not None:
        raise service.failure


def _add_health(app: FastAPI, service: Service) -> None:
    @app.api_route("/v2", methods=_PROBED)
    async def server() -> dict[str, Any]:
        return SERVER

    @app.api_route("/v2/health/live", methods=_PROBED)
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.api_route("/v2/health/ready", methods=_PROBED)
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)


def _add_model(app: FastAPI, service: Service, prefix: str) -> None:
    model = service.model

    @app.api_route(prefix, methods=_PROBED)
    async def metadata(name: str, version: str = VERSION) -> dict[str, Any]:
        model.require(name, version)
        return model.metadata()

    @app.api_route(f"{prefix}/ready", methods=_PROBED)
    async def ready(name: str, version: str = VERSION) -> JSONResponse:
        model.require(name, version)
        return JSONResponse({"name": name, "ready": service.ready}, 200 if service.ready else 503)

    @app.post(f"{prefix}/infer")
    async def infer(request: Request, name: str, version: str = VERSION) -> Response:
        body = await _body(request, model.limits.max_body)
        model.require(name, version)
        answer = await service.infer(body, _json_length(request))
        if answer.json_length is None:
            return Response(answer.body, media_type="application/json")
        headers = {_JSON_LENGTH: str(answer.json_length)}
        return Response(answer.body, media_type="application/octet-stream", headers=headers)


class _UnreadError(RefusedError):
    """A request refused before its body was read to the end."""


class _Refusal(JSONResponse):
    """An answer to a request whose body may still be on its way.

    Closing at once would reset the connection, and a client that is still sending would never see
    the answer; so what comes is dropped for a while, within bounds, before the answer ends.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_drop_body(receive), _LINGER_S)
        await send({"type": "http.response.body", "body": b""})


async def _drop_body(receive: Receive) -> None:
    dropped, more = 0, True
    while more and dropped < _LINGER_BYTES:
        message = await receive()
        dropped += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)


async def _body(request: Request, limit: int) -> bytearray:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise _UnreadError(f"content-encoding '{encoding}' is not supported; send it plain", 415)
    too_large = _UnreadError(f"the body exceeds the limit of {limit} bytes; send fewer images", 413)
    claimed = request.headers.get("content-length", "0")
    if claimed.isdecimal() and int(claimed) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return body


def _json_length(request: Request) -> int | None:
    value = request.headers.get(_JSON_LENGTH)
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal() and len(value) < 20):
        raise RefusedError(f"{_JSON_LENGTH} is '{value}'; it must be a number of bytes")
    return int(value)


def _add_errors(app: FastAPI) -> None:
    def answer(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": message}, status)

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        if isinstance(error, _UnreadError):
            return _Refusal({"error": str(error)}, error.status, headers={"Connection": "close"})
        return answer(error.status, str(error))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = short_line(f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse({"error": message}, error.status_code, headers=error.headers)

    async def gone(_: Request, __: Exception) -> Response:
        return answer(400, "the client went away")

    async def internal(_: Request, __: Exception) -> Response:
        return answer(500, "internal error; the server's log says more")

    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        RefusedError: refused,
        HTTPException: http,
        ClientDisconnect: gone,
        Exception: internal,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)

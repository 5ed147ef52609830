"""REST service of the Open Inference Protocol, an application of FastAPI."""

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from advmoe_deploy.serving.online.access.tls import Tls
from advmoe_deploy.serving.online.access.token import Token
from advmoe_deploy.serving.online.extensions import model_config, model_statistics
from advmoe_deploy.serving.online.http.guard import Guard
from advmoe_deploy.serving.online.http.image import Image
from advmoe_deploy.serving.online.http.infer import Infer
from advmoe_deploy.serving.online.http.openapi import add_description
from advmoe_deploy.serving.online.http.packing import UnreadError
from advmoe_deploy.serving.online.http.page import add_page
from advmoe_deploy.serving.online.http.reading import DROP, never
from advmoe_deploy.serving.online.http.repository import add_repository
from advmoe_deploy.serving.online.metrics import CONTENT_TYPE
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.operations.reload import Reloader
from advmoe_deploy.serving.online.operations.requests import Watcher
from advmoe_deploy.serving.online.protocol import SERVER, RefusedError, short_line
from advmoe_deploy.serving.online.server import Beside, Server, collect_less
from advmoe_deploy.serving.online.service import Service
from advmoe_deploy.serving.online.shedding import shedding

_PROBED = ["GET", "HEAD"]
_LINGER_S = 2.0
_TO_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")


class _App(FastAPI):
    """The application behind what is in front of it."""

    front: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.front(scope, receive, send)


class _Shortcut:
    """Hands inference requests straight to what answers them, and all others to the application.

    The way through the application takes a tenth of the time that the event loop has for a request.
    """

    def __init__(self, infer: ASGIApp, app: ASGIApp) -> None:
        self._infer, self._app = infer, app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = scope["type"] == "http" and _TO_INFER.fullmatch(scope["path"])
        if not found or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        scope["path_params"] = {"name": found[1], "version": found[2] or ""}
        try:
            await self._infer(scope, receive, send)
        except RefusedError as error:
            await _refused(error)(scope, receive, send)
        except Exception:
            with contextlib.suppress(RuntimeError):  # where an answer has begun
                await _failed()(scope, receive, send)
            raise  # to the log


def build_app(
    models: Models,
    hosts: frozenset[str] | None,
    on_warm: Callable[[], None] | None = None,
    token: Token | None = None,
    *,
    reloader: Reloader | None = None,
    allow_reload: bool = False,
    page: bool = True,
    watchers: Sequence[Watcher] = (),
) -> FastAPI:
    """Return the application; middleware that is added to it does not see inference requests.

    Args:
        models: what answers.
        hosts: names that a request may call this server; ``None`` is any.
        on_warm: called when the warm-up has ended, well or not.
        token: what requests have to show.
        reloader: what loads their bundles again when it is asked.
        allow_reload: whether a request may ask it.
        page: whether there is a web page at ``/``.
        watchers: what is told of each request that has ended.
    """

    async def warm_up() -> None:
        await models.warm_up()
        if reloader is not None and models.failure is None:
            reloader.start()
        if on_warm is not None:
            on_warm()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        models.start()
        warming = asyncio.create_task(warm_up())
        yield
        try:
            await warming
        finally:
            if reloader is not None:
                await reloader.end()
            models.close()

    app = _App(
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # to an address made of what the client calls this server
    )
    infer = Infer(models)
    app.front = Guard(_Shortcut(infer, super(_App, app).__call__), hosts, token, watchers)
    _add_errors(app)
    prefixes = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
    for prefix in prefixes:  # inference as well, for what other methods are answered
        app.router.routes.append(Route(f"{prefix}/infer", infer, methods=["POST"]))
        app.router.routes.append(Route(f"{prefix}/image", Image(models), methods=["POST"]))
    _add_health(app, models)
    add_description(app)
    if page:
        add_page(app)
    add_repository(app, models, reloader if allow_reload else None)
    for prefix in prefixes:
        _add_model(app, models, prefix)
    return app


def run_app(
    models: Models,
    listener: socket.socket,
    announce: Callable[[], None],
    *,
    hosts: frozenset[str] | None,
    beside: Beside | None = None,
    token: Token | None = None,
    tls: Tls | None = None,
    reloader: Reloader | None = None,
    allow_reload: bool = False,
    page: bool = True,
    watchers: Sequence[Watcher] = (),
) -> None:
    """Serve on ``listener``, and what is ``beside`` it, until SIGTERM or Ctrl-C, then drain.

    Raises:
        MachineError: what is beside it could not begin.
        Exception: whatever the warm-up raised.
        KeyboardInterrupt: it was Ctrl-C.
    """

    def on_warm() -> None:
        if models.failure is not None:
            server.stop(announced=False)
        elif not server.stopping:
            collect_less()
            announce()

    app = build_app(
        models,
        hosts,
        on_warm,
        token,
        reloader=reloader,
        allow_reload=allow_reload,
        page=page,
        watchers=watchers,
    )
    context = None if tls is None else tls.context
    server = Server(app, models.limits, beside, context, shedding(models, watchers))
    models.is_stopping = lambda: server.stopping
    server.is_busy = lambda: models.busy
    server.run_until_stopped(listener)
    if failure := server.failure or models.failure:
        raise failure


def _add_health(app: FastAPI, models: Models) -> None:
    @app.api_route("/v2", methods=_PROBED)
    async def server() -> dict[str, Any]:
        return SERVER

    @app.api_route("/v2/health/live", methods=_PROBED)
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.api_route("/v2/health/ready", methods=_PROBED)
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": models.ready}, 200 if models.ready else 503)

    @app.api_route("/v2/models/stats", methods=_PROBED)
    async def statistics() -> dict[str, Any]:
        return _statistics(models.chosen())

    @app.api_route("/metrics", methods=_PROBED)
    async def metrics() -> Response:
        return Response(models.figures(), media_type=CONTENT_TYPE)


def _add_model(app: FastAPI, models: Models, prefix: str) -> None:
    @app.api_route(prefix, methods=_PROBED)
    async def metadata(name: str, version: str = "") -> dict[str, Any]:
        return models.find(name, version).model.metadata(models.versions(name))

    @app.api_route(f"{prefix}/config", methods=_PROBED)
    async def config(name: str, version: str = "") -> dict[str, Any]:
        return model_config(models.find(name, version).model)

    @app.api_route(f"{prefix}/stats", methods=_PROBED)
    async def statistics(name: str, version: str = "") -> dict[str, Any]:
        return _statistics(models.chosen(name, version))

    @app.api_route(f"{prefix}/ready", methods=_PROBED)
    async def ready(name: str, version: str = "") -> JSONResponse:
        is_ready = models.is_ready(models.find(name, version))
        return JSONResponse({"name": name, "ready": is_ready}, 200 if is_ready else 503)


def _statistics(services: Sequence[Service]) -> dict[str, Any]:
    return {"model_stats": [model_statistics(each.model, each.metrics) for each in services]}


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
            await asyncio.wait_for(_end_of_body(scope, receive), _LINGER_S)
        await send({"type": "http.response.body", "body": b""})


async def _end_of_body(scope: Scope, receive: Receive) -> None:
    """Return once all of the body has come, or its client has left."""
    scope.get(DROP, never)()  # by the connection, since here each piece costs a turn of the loop
    more = True
    while more:
        message = await receive()
        more = message["type"] == "http.request" and message.get("more_body", False)


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers=headers)


def _failed() -> JSONResponse:
    return _error(500, "internal error; the server's log says more")


def _refused(error: RefusedError) -> JSONResponse:
    headers = {} if error.retry_s is None else {"Retry-After": str(error.retry_s)}
    if isinstance(error, UnreadError):
        headers["Connection"] = "close"
        return _Refusal({"error": str(error)}, error.status, headers=headers)
    return _error(error.status, str(error), headers)


def _add_errors(app: FastAPI) -> None:
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        return _refused(error)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = short_line(f"{request.method} {request.url.path}: {error.detail}")
        return _error(error.status_code, message, error.headers)

    async def gone(_: Request, __: Exception) -> Response:
        return _error(400, "the client went away")

    async def internal(_: Request, __: Exception) -> Response:
        return _failed()

    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        RefusedError: refused,
        HTTPException: http,
        ClientDisconnect: gone,
        Exception: internal,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)

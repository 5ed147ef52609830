"""Calls of the service ``GRPCInferenceService``, by name, and the status of what is refused."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import service_pb2

from advmoe_deploy.serving.online.access.token import HOW_TO_ENTER, Token
from advmoe_deploy.serving.online.extensions import model_config, model_statistics
from advmoe_deploy.serving.online.grpc.gate import Gate
from advmoe_deploy.serving.online.grpc.infer import Infer
from advmoe_deploy.serving.online.grpc.messages import parsed
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.operations.reload import (
    Reloader,
    load_on_request,
    refuse_unload,
)
from advmoe_deploy.serving.online.operations.requests import (
    PARENT,
    REQUEST_ID,
    Record,
    Watcher,
    id_of,
    tell,
)
from advmoe_deploy.serving.online.protocol import (
    CLIENT_LEFT,
    SERVER,
    NotReadyError,
    RefusedError,
)

_log = logging.getLogger(__name__)

SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
# Bytes of a request that holds no tensors, and how many of them are read at once.
_SHORT = 4096
_FEW = 4
# Who looks whether a server lives has no token.
_OPEN = {"ServerLive", "ServerReady"}
# By the status that HTTP has for it.
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    CLIENT_LEFT: grpc.StatusCode.CANCELLED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.RESOURCE_EXHAUSTED,
}

Call = Callable[[Any, Record], Awaitable[bytes]]
# From a parsed request to a response.
Answer = Callable[[Any], Awaitable[Any]]


class Calls:
    """Answers calls; ``open`` of them are under way, the last came at ``last_s`` (monotonic)."""

    def __init__(
        self,
        models: Models,
        longest: int,
        token: Token | None = None,
        reloader: Reloader | None = None,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        """Answer for ``models``; no message is longer than ``longest`` bytes.

        With a ``token``, calls have to show it, but for those that ask for the server's health.
        With a ``reloader``, they may have bundles loaded again. The ``watchers`` are told of each.
        """
        limits, self._token, self._watchers = models.limits, token, watchers
        self.refusing, self.open, self.last_s = False, 0, 0.0
        self._infer = Gate(max(2, limits.memory // longest), limits.body_s)
        self._short = Gate(_FEW, limits.body_s)
        self._calls: dict[str, Call] = {
            "ServerLive": _fixed(lambda: service_pb2.ServerLiveResponse(live=True)),
            "ServerReady": _fixed(lambda: service_pb2.ServerReadyResponse(ready=models.ready)),
            "ModelInfer": Infer(models, self._infer),
        }
        for name, answer in (_answers(models) | _repository(models, reloader)).items():
            kind = service_pb2.DESCRIPTOR.message_types_by_name[f"{name}Request"]._concrete_class  # noqa: SLF001, RUF100
            self._calls[name] = partial(self._answer, kind, answer)

    def handlers(self) -> dict[str, Any]:
        """Return a handler of gRPC's for each method of the service, offered or not."""
        # Requests are read as streams, so that a message is asked for only when it has its turn.
        return {
            method.name: grpc.stream_unary_rpc_method_handler(partial(self._handle, method.name))
            for method in SERVICE.methods
        }

    def close(self) -> None:
        """Read no more messages."""
        for gate in (self._infer, self._short):
            gate.close()

    async def _handle(self, name: str, _: Any, context: Any) -> bytes:
        self.open += 1
        self.last_s = time.monotonic()
        told = dict(context.invocation_metadata() or ())
        record = Record("grpc", id_of(told.get(REQUEST_ID, "")), name, parent=told.get(PARENT, ""))
        try:
            if self.refusing:
                raise NotReadyError("the server is stopping; ask again elsewhere")
            self._require_token(name, told.get("authorization", ""))
            answer = await self._calls.get(name, self._unknown)(context, record)
            record.status = 200
            await context.send_initial_metadata(((REQUEST_ID, record.id),))
            return answer
        except RefusedError as error:
            record.status, end = error.status, _end_of(error)
        except (asyncio.CancelledError, grpc.aio.InternalError) as left:
            record.status = CLIENT_LEFT
            raise asyncio.CancelledError from left
        except Exception:
            _log.exception("a call of %s failed", name)
            end = _end_of(RefusedError("internal error; the server's log says more", 500))
        finally:
            self.open -= 1
            if self._watchers:
                tell(record, self._watchers)
        # Out here, since what is raised would keep the request: by its context, in a circle.
        # The id is at the end, since libraries ask again only where nothing came before that.
        code, details, trailing = end
        await context.abort(code, details, (*trailing, (REQUEST_ID, record.id)))
        raise AssertionError("abort raises")

    def _require_token(self, name: str, shown: str) -> None:
        if self._token is None or name in _OPEN:
            return
        if not self._token.admits(shown.encode()):
            raise RefusedError(HOW_TO_ENTER, 401)

    async def _unknown(self, _: Any, __: Record) -> bytes:
        offered = ", ".join(sorted(self._calls))
        raise RefusedError(f"this call is not offered; there are {offered}", 501)

    async def _answer(self, kind: Any, answer: Answer, context: Any, _: Record) -> bytes:
        message = await self._short.read(context)
        if len(message) > _SHORT:
            raise RefusedError(f"the message exceeds the limit of {_SHORT} bytes")
        return bytes((await answer(parsed(kind, message))).SerializeToString())


def _answers(models: Models) -> dict[str, Answer]:
    """Return what answers a request without tensors, by the name of its call."""

    async def ready(asked: Any) -> Any:
        found = models.find(asked.name, asked.version)
        return service_pb2.ModelReadyResponse(ready=models.is_ready(found))

    async def server(_: Any) -> Any:
        return ParseDict(SERVER, service_pb2.ServerMetadataResponse())

    async def metadata(asked: Any) -> Any:
        found = models.find(asked.name, asked.version).model.metadata(models.versions(asked.name))
        return ParseDict(found, service_pb2.ModelMetadataResponse())

    async def config(asked: Any) -> Any:
        found = {"config": model_config(models.find(asked.name, asked.version).model)}
        return ParseDict(found, service_pb2.ModelConfigResponse())

    async def statistics(asked: Any) -> Any:
        found = models.chosen(asked.name, asked.version)
        stats = {"model_stats": [model_statistics(each.model, each.metrics) for each in found]}
        return ParseDict(stats, service_pb2.ModelStatisticsResponse())

    return {
        "ModelReady": ready,
        "ServerMetadata": server,
        "ModelMetadata": metadata,
        "ModelConfig": config,
        "ModelStatistics": statistics,
    }


def _repository(models: Models, reloader: Reloader | None) -> dict[str, Answer]:
    """Return what answers the calls of the model repository extension, by name."""

    async def index(asked: Any) -> Any:
        found = {"models": models.index(ready_only=asked.ready)}
        return ParseDict(found, service_pb2.RepositoryIndexResponse())

    async def load(asked: Any) -> Any:
        await load_on_request(models, reloader, asked.model_name, asked.parameters)
        return service_pb2.RepositoryModelLoadResponse()

    async def unload(_: Any) -> Any:
        refuse_unload()

    return {"RepositoryIndex": index, "RepositoryModelLoad": load, "RepositoryModelUnload": unload}


def _fixed(answer: Callable[[], Any]) -> Call:
    """Return a call that is answered unread, whatever else is being read."""

    async def call(_: Any, __: Record) -> bytes:
        return bytes(answer().SerializeToString())

    return call


def _end_of(error: RefusedError) -> tuple[Any, str, tuple[tuple[str, str], ...]]:
    """Return code, details and trailing metadata of a call that is refused."""
    code = _CODES.get(error.status, grpc.StatusCode.INTERNAL)
    if isinstance(error, NotReadyError):
        code = grpc.StatusCode.UNAVAILABLE
    metadata = () if error.retry_s is None else (("retry-after", str(error.retry_s)),)
    return code, str(error), metadata

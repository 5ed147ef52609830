"""The protocol over gRPC in front of Ray Serve, whose gRPC port hands on what it is given.

Messages cross Ray as bytes: it pickles them, which those of NVIDIA's client do not survive, and
what reads them is then bounded as in ``advmoe serve``.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from advmoe_deploy.serving.online.access.token import Token
from advmoe_deploy.serving.online.grpc.calls import SERVICE, Calls
from advmoe_deploy.serving.online.grpc.server import longest_message
from advmoe_deploy.serving.online.models import Models

METHODS = tuple(method.name for method in SERVICE.methods if not method.server_streaming)


def add_service(_: object, server: Any) -> None:
    """Add the service to ``server``; what ``grpc_servicer_functions`` of Ray Serve is to name."""
    handlers = {name: grpc.unary_unary_rpc_method_handler(_never) for name in METHODS}
    service = grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)
    server.add_generic_rpc_handlers((service,))


def _never(_: bytes, __: Any) -> bytes:
    raise AssertionError("Ray Serve answers in its place")


class Answer(bytes):
    """A message that is serialised already."""

    def SerializeToString(self) -> bytes:
        """Return the bytes, as Ray Serve asks for them."""
        return bytes(self)


class EndedError(Exception):
    """A call that was ended with a code, which Ray Serve was told."""


class GrpcCalls:
    """Answers calls for ``models`` that come through Ray Serve."""

    def __init__(self, models: Models, token: Token | None, *, open_to_all: bool) -> None:
        """Take the ``token`` that calls have to show; without one they are refused.

        Ray Serve listens on every interface, so that without a token somebody has to say that it is
        ``open_to_all``.
        """
        calls = Calls(models, longest_message(models), token)
        self._handlers = calls.handlers()
        self._refused = token is None and not open_to_all

    async def answer(self, name: str, message: bytes, context: Any) -> Answer:
        """Return the answer to a call of the method ``name``.

        Raises:
            EndedError: it is refused; the code is in Ray Serve's ``context``.
        """
        call = _Call(message, context)
        if self._refused:
            reason = "Ray's port is open to other machines; set token_file, or insecure"
            await call.abort(grpc.StatusCode.UNAUTHENTICATED, reason)
        return Answer(await self._handlers[name].stream_unary(None, call))


def method(name: str) -> Callable[[Any, bytes, Any], Awaitable[Answer]]:
    """Return the method ``name`` of a deployment whose ``grpc`` are :class:`GrpcCalls`."""

    async def call(self: Any, message: bytes, grpc_context: Any) -> Answer:
        answer: Answer = await self.grpc.answer(name, message, grpc_context)
        return answer

    return call


class _Call:
    """Context of a call as gRPC's library has it; Ray Serve knows half of it."""

    def __init__(self, message: bytes, context: Any) -> None:
        self._message, self._context = message, context

    async def read(self) -> bytes:
        return self._message

    def invocation_metadata(self) -> Any:
        return self._context.invocation_metadata()

    def time_remaining(self) -> None:
        return None

    async def send_initial_metadata(self, metadata: Sequence[Any]) -> None:
        self._context.set_trailing_metadata([*metadata])  # Ray Serve has no other

    async def abort(self, code: Any, details: str, trailing: Sequence[Any] = ()) -> None:
        self._context.set_code(code)
        self._context.set_details(details)
        self._context.set_trailing_metadata([*trailing])
        raise EndedError(details)

"""gRPC server: its options, its port, and an end that loses no call."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

# The library would write lines of its own about whatever a stranger sends.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc.aio

from advmoe_deploy.errors import MachineError
from advmoe_deploy.serving.online.access.tls import Tls
from advmoe_deploy.serving.online.access.token import Token
from advmoe_deploy.serving.online.grpc.calls import SERVICE, Calls
from advmoe_deploy.serving.online.grpc.wire import MAX_ENVELOPE
from advmoe_deploy.serving.online.limits import Limits
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.operations.reload import Reloader
from advmoe_deploy.serving.online.operations.requests import Watcher

_STREAMS = 256  # calls on one connection; a client waits with more
_WINDOW = 64 << 10  # bytes of a message that come before it is asked for
_METADATA = 32 << 10
# How long the rest of a message may take once the server stops.
_MESSAGE_GRACE_S = 1.0
# Calls on their way are lost when the library stops, so it waits for a pause this long, until then.
_QUIET_S, _RESTLESS_S = 0.3, 3.0
# How long clients may take to read the last answers.
_READING_S = 5.0


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Return whether what the library logs is more than an answer whose client had left.

    It means to stay silent there, but does not know of all: a deadline may pass while it sends.
    """
    return record.exc_info is None or not isinstance(record.exc_info[1], grpc.aio.InternalError)


logging.getLogger("grpc._cython.cygrpc").addFilter(_is_worth_a_line)


class GrpcServer:
    """Answers for ``models`` beside the HTTP server, in the same event loop."""

    def __init__(
        self,
        models: Models,
        reserved: socket.socket,
        token: Token | None = None,
        tls: Tls | None = None,
        reloader: Reloader | None = None,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        """Take the address that ``reserved`` holds until :meth:`start`.

        With a ``reloader``, calls may have bundles loaded again; ``watchers`` are told of each.
        """
        self._models, self._reserved, self._token, self._tls = models, reserved, token, tls
        self._reloader, self._watchers = reloader, watchers
        host, port = reserved.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self, connections: int) -> None:
        """Begin to answer, on so many ``connections`` at most.

        Raises:
            MachineError: the port was taken in the moment in which it was free.
        """
        longest = longest_message(self._models)
        self._calls = Calls(self._models, longest, self._token, self._reloader, self._watchers)
        self._server = grpc.aio.server(
            options=_options(replace(self._models.limits, connections=connections), longest),
            maximum_concurrent_rpcs=connections,
        )
        handlers = grpc.method_handlers_generic_handler(SERVICE.full_name, self._calls.handlers())
        self._server.add_generic_rpc_handlers((handlers,))
        self._reserved.close()
        try:
            self._add_port()
        except RuntimeError:
            await self._server.start()  # what never began cannot be stopped, and would stay
            await self._server.stop(None)
            raise MachineError(f"{self.address} is in use; choose another --grpc-port") from None
        await self._server.start()

    def _add_port(self) -> None:
        if self._tls is None:
            self._server.add_insecure_port(self.address)
        else:
            credentials = grpc.ssl_server_credentials([(self._tls.key, self._tls.chain)])
            self._server.add_secure_port(self.address, credentials)

    def refuse(self) -> None:
        """Take no new calls; what is under way is answered, messages that come soon included."""
        self._calls.refusing = True
        asyncio.get_running_loop().call_later(_MESSAGE_GRACE_S, self._calls.close)

    async def close(self, in_hurry: Callable[[], bool]) -> None:
        """Wait for the calls under way, unless there is hurry, and close the port."""
        began = time.monotonic()
        while not in_hurry() and (self._calls.open or self._is_restless(began)):
            await asyncio.sleep(0.02)
        await self._server.stop(None if in_hurry() else _READING_S)

    def _is_restless(self, began: float) -> bool:
        now = time.monotonic()
        return now - began < _RESTLESS_S and now - max(began, self._calls.last_s) < _QUIET_S


def longest_message(models: Models) -> int:
    """Return the bytes of the longest message that the ``models`` take, and hold them to that.

    The library is told once, so that models of larger images cannot come later.
    """
    models.longest = max((each.model.longest for each in models.all()), default=0)
    return min(models.limits.max_body, models.longest + MAX_ENVELOPE)


def _options(limits: Limits, longest: int) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # else two servers share a port without a word
        ("grpc.max_receive_message_length", longest),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", _STREAMS),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.max_metadata_size", _METADATA),
        ("grpc.absolute_max_metadata_size", _METADATA),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", _WINDOW),
        ("grpc.server_handshake_timeout_ms", round(1000 * limits.head_s)),
        ("grpc.max_connection_idle_ms", round(1000 * limits.keep_alive_s)),
        ("grpc.keepalive_time_ms", 60_000),  # else clients that are cut off stay for hours
        ("grpc.keepalive_timeout_ms", 20_000),
    ]

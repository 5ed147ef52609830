"""Servers on the loopback for tests, and requests to them."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.runner import Prediction, Runner
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.grpc.server import GrpcServer
from advmoe_deploy.serving.online.http.rest import build_app
from advmoe_deploy.serving.online.limits import Limits
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.offers import Offer
from advmoe_deploy.serving.online.operations.reload import Reloader
from advmoe_deploy.serving.online.operations.requests import Watcher
from advmoe_deploy.serving.online.protocol import served_model
from advmoe_deploy.serving.online.serve import LOOPBACK
from advmoe_deploy.serving.online.server import Server
from advmoe_deploy.serving.online.service import Service
from advmoe_deploy.serving.online.shedding import shedding

LIMITS = Limits(max_images=64, max_body=200_000)
INFER = "/v2/models/advmoe/infer"
ONE = np.full((1, 1, 8, 8), 0.5, dtype=np.float32)


@dataclass
class Live:
    """A running server."""

    address: str
    server: Server
    service: Service
    grpc: str  # the address of gRPC
    connections: list[socket.socket] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def connect(self) -> socket.socket:
        """Return a connection, which is closed with the server at the latest."""
        host, port = self.address.split(":")
        self.connections.append(socket.create_connection((host, int(port)), timeout=20))
        return self.connections[-1]


@contextlib.contextmanager
def running(
    bundle: Bundle,
    runner: Runner,
    limits: Limits = LIMITS,
    drain_s: float = 0.0,
    again: Callable[[], Bundle] | None = None,
    opened: Callable[[Bundle], Runner] = open_runner,
    watchers: Sequence[Watcher] = (),
) -> Iterator[Live]:
    """Serve ``runner`` on a free port of the loopback until the block ends or it is stopped.

    Requests may have loaded what ``again`` returns, if given, as ``opened``. The ``watchers`` are
    told of each that has ended.
    """
    limits = replace(limits, drain_s=drain_s)
    models = Models(limits)
    service = models.add(served_model(bundle, limits=limits), runner)
    offers = {(service.model.name, service.model.version): Offer(bundle, again=again)}
    reloader = None if again is None else Reloader(models, offers, opened)
    reserved = socket.create_server(("127.0.0.1", 0))
    beside = GrpcServer(models, reserved, reloader=reloader, watchers=watchers)
    app = build_app(
        models, LOOPBACK, reloader=reloader, allow_reload=again is not None, watchers=watchers
    )
    server = Server(app, limits, beside, shed=shedding(models, watchers))
    models.is_stopping = lambda: server.stopping
    server.is_busy = lambda: models.busy
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while reserved.fileno() >= 0 or not server.started:
            time.sleep(0.01)
        live = Live(address, server, service, beside.address)
        try:
            yield live
        finally:
            server.stop(announced=False)
            if isinstance(runner, SlowRunner):
                runner.let_go.set()
            for connection in live.connections:
                connection.close()
            thread.join()


@contextlib.contextmanager
def served(bundle: Bundle, runner: Runner) -> Iterator[str]:
    """Serve and yield the address."""
    with running(bundle, runner) as live:
        yield live.address


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_until_ready(address: str) -> None:
    while httpx.get(f"http://{address}/v2/health/ready").status_code != 200:
        time.sleep(0.01)


def request_for(images: NDArray[Any], **changes: Any) -> dict[str, Any]:
    tensor = {
        "name": "images",
        "datatype": "FP32",
        "shape": list(images.shape),
        "data": images.ravel().tolist(),
    }
    return {"inputs": [{**tensor, **changes}]}


def post(body: bytes, *headers: str, length: int | None = None) -> bytes:
    """Return the text of an inference request; ``length`` is what it claims, if it is not true."""
    lines = [
        f"POST {INFER} HTTP/1.1",
        "Host: localhost",
        f"Content-Length: {len(body) if length is None else length}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def all_of(connection: socket.socket) -> bytes:
    """Return what comes until the server closes."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while more := connection.recv(1 << 16):
            answer += more
    return answer


GOOD = post(json.dumps(request_for(ONE)).encode())


class SlowRunner:
    """Answers when it is let go."""

    name, precision, tf32 = "slow", "fp32", False

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.batches: list[int] = []

    def infer(self, images: NDArray[np.float32]) -> Prediction:
        self.batches.append(len(images))
        self.let_go.wait(timeout=30)
        ids, weights = np.zeros((len(images), 1), np.int64), np.ones((len(images), 1), np.float32)
        logits = np.zeros((len(images), 10), np.float32)
        return Prediction(logits, {"router": ids}, {"router": weights})

    def close(self) -> None: ...

    def __enter__(self) -> "SlowRunner":
        return self

    def __exit__(self, *_: object) -> None: ...

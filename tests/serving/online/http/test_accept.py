"""Connections are accepted and requests begun a few at a time; none that waits is lost."""

import asyncio
import errno
import itertools
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.serving.online.http import accept
from advmoe_deploy.serving.online.http.accept import Acceptor, Crowd
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.protocol import InferRequest, served_model
from advmoe_deploy.serving.online.service import Arrival, Service
from tests.serving.online.live import LIMITS, ONE, SlowRunner


def with_acceptor(clients: int, test: Callable[[Acceptor, list[object]], Awaitable[None]]) -> None:
    """Run ``test`` on an acceptor of a socket at which so many clients wait."""
    made: list[object] = []

    class Counted(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.append(transport)

    async def run() -> None:
        acceptor = Acceptor(listener, Counted, backlog=100)
        await test(acceptor, made)
        for transport in made:
            transport.abort()  # type: ignore[attr-defined]

    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        waiting = [socket.create_connection(listener.getsockname()) for _ in range(clients)]
        try:
            asyncio.run(run())
        finally:
            for connection in waiting:
                connection.close()


def test_a_crowd_does_not_keep_the_loop_from_others() -> None:
    async def test(acceptor: Acceptor, made: list[object]) -> None:
        counts = [0]
        while counts[-1] < 50:
            await asyncio.sleep(0)
            counts.append(len(made))
        steps = [after - before for before, after in itertools.pairwise(counts)]
        assert max(steps) <= 16
        acceptor.close()

    with_acceptor(50, test)


def test_who_waits_at_the_end_is_accepted() -> None:
    async def test(acceptor: Acceptor, made: list[object]) -> None:
        acceptor.close()
        while acceptor.beginning:
            await asyncio.sleep(0)
        assert len(made) == 40

    with_acceptor(40, test)


def test_a_crowd_is_told_and_closed_unless_it_asks_for_health() -> None:
    """There are as many as there may be; of more, one asks for health, and one nothing yet."""
    asked = [b"POST /v2 HTTP/1.1\r\n\r\n"] * 149 + [b"GET /v2/health/live HTTP/1.1\r\n\r\n", b""]
    made: list[asyncio.Transport] = []

    class Counted(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            made.append(transport)

    async def run() -> None:
        acceptor = Acceptor(listener, Counted, 400, crowd=Crowd(lambda: 7 + len(made), 7))
        while len(made) < 2:
            await asyncio.sleep(0)
        answers = [await asyncio.to_thread(each.recv, 4096) for each in waiting[:149]]
        assert all(answer.startswith(b"HTTP/1.1 503") for answer in answers)
        assert all(b"retry-after: 1" in answer for answer in answers)
        acceptor.close()
        assert acceptor.beginning  # those who were told have a moment to read it
        acceptor.give_up()
        assert not acceptor.beginning
        for transport in made:
            transport.abort()

    with socket.create_server(("127.0.0.1", 0), backlog=400) as listener:
        waiting = [socket.create_connection(listener.getsockname(), timeout=20) for _ in asked]
        for connection, text in zip(waiting, asked, strict=True):
            connection.sendall(text)
        asyncio.run(run())
        for connection in waiting[:149]:
            assert connection.recv(1) == b""  # closed, and not reset
        for connection in waiting:
            connection.close()


@pytest.mark.parametrize("name", ["ECONNABORTED", "ENETDOWN", "EPROTO", "EHOSTUNREACH"])
def test_who_waits_behind_one_that_has_gone_is_accepted(name: str) -> None:
    class Aborting(socket.socket):
        aborted = False

        def accept(self) -> tuple[socket.socket, object]:
            if not self.aborted:
                self.aborted = True
                raise OSError(getattr(errno, name), name)
            return super().accept()

    async def run() -> int:
        made: list[asyncio.BaseTransport] = []

        class Counted(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                made.append(transport)

        acceptor = Acceptor(listener, Counted, backlog=8)
        acceptor.close()
        while acceptor.beginning:
            await asyncio.sleep(0)
        for transport in made:
            transport.close()
        return len(made)

    with Aborting() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        waiting = [socket.create_connection(listener.getsockname()) for _ in range(3)]
        assert asyncio.run(run()) == 3
        for connection in waiting:
            connection.close()


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_out_of_descriptors_is_said_once_and_passes() -> None:
    program = """
import asyncio, resource, socket, sys
from advmoe_deploy.serving.online.http.accept import Acceptor

class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        transport.write(b"x")

async def main():
    listener = socket.create_server(("127.0.0.1", 0), backlog=100)
    resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
    acceptor = Acceptor(listener, Echo, backlog=100)
    print(listener.getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    acceptor.close()

asyncio.run(main())
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], text=True, **pipes) as run:
        assert run.stdout
        address = ("127.0.0.1", int(run.stdout.readline()))
        crowd = [socket.create_connection(address, timeout=30) for _ in range(60)]
        for connection in crowd[:10]:
            assert connection.recv(1) == b"x"
        last = socket.create_connection(address, timeout=30)
        for connection in crowd:
            connection.close()
        assert last.recv(1) == b"x"
        last.close()
        _, said = run.communicate("\n", timeout=30)
    assert said.count("no connection can be accepted now") == 1
    assert "Traceback" not in said


def test_a_server_that_ends_while_it_has_no_descriptors_does_not_complain_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Full(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            raise OSError(errno.EMFILE, "Too many open files")

    async def run() -> list[object]:
        said: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        acceptor = Acceptor(listener, asyncio.Protocol, backlog=8)
        await asyncio.sleep(0.005)
        acceptor.close()
        await asyncio.sleep(0.05)
        return said

    monkeypatch.setattr(accept, "_PAUSE_S", 0.02)
    with Full() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        with socket.create_connection(listener.getsockname()):
            assert asyncio.run(run()) == []


def test_the_answers_of_a_batch_go_on_a_few_in_each_turn(
    tiny_bundle: Bundle, slow: SlowRunner
) -> None:
    now, went = [0], list[int]()

    async def ask(service: Service) -> None:
        with Arrival(service) as arrival:
            await service.predict(InferRequest(ONE, {}), lambda: False, arrival)
        went.append(now[0])

    async def run() -> None:
        models = Models(LIMITS)
        service = models.add(served_model(tiny_bundle, limits=LIMITS), slow)
        models.start()
        await models.warm_up()
        slow.let_go.clear()
        tasks = [asyncio.create_task(ask(service)) for _ in range(60)]
        while service.waiting < 60:
            await asyncio.sleep(0.001)
        slow.let_go.set()
        while not all(task.done() for task in tasks):
            now[0] += 1
            await asyncio.sleep(0)
        models.close()

    asyncio.run(run())
    assert len(went) == 60
    assert max(map(went.count, went)) <= 16

"""A server before it is ready, and connections that nobody uses."""

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import httpx
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.serving.online.http.connection import Connection
from advmoe_deploy.serving.online.limits import Limits
from advmoe_deploy.serving.online.serve import create_app
from advmoe_deploy.serving.online.server import Server
from advmoe_deploy.serving.online.turns import Turns
from tests.serving.online.live import (
    GOOD,
    INFER,
    LIMITS,
    ONE,
    Live,
    SlowRunner,
    all_of,
    request_for,
    running,
    served,
    wait_for,
    wait_until_ready,
)


def test_ready_comes_after_the_warm_up_and_health_answers_meanwhile(tiny_bundle: Bundle) -> None:
    runner = SlowRunner()
    with served(tiny_bundle, runner) as address, httpx.Client(base_url=f"http://{address}") as http:
        assert http.get("/v2/health/live").status_code == 200
        assert http.get("/v2/health/ready").status_code == 503
        assert http.get("/v2/models/advmoe/ready").status_code == 503
        assert http.post(INFER, json=request_for(ONE)).status_code == 503
        runner.let_go.set()
        wait_until_ready(address)
        runner.let_go.clear()
        answers: list[int] = []
        url = f"http://{address}{INFER}"
        waiting = threading.Thread(
            target=lambda: answers.append(httpx.post(url, json=request_for(ONE)).status_code)
        )
        waiting.start()
        assert http.get("/v2/health/ready").status_code == 200
        assert answers == []
        runner.let_go.set()
        waiting.join()
        assert answers == [200]


def test_idle_connections_are_kept_longer_than_proxies_keep_theirs(tiny_bundle: Bundle) -> None:
    app = create_app(tiny_bundle, SlowRunner())
    assert Server(app, Limits()).config.timeout_keep_alive == 75


def test_an_idle_connection_is_closed_when_its_time_is_over(tiny_bundle: Bundle) -> None:
    command = [sys.executable, "-m", "advmoe_deploy.cli.app", "serve", str(tiny_bundle.path)]
    with subprocess.Popen([*command, "--port=0", "--keep-alive=0"], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        port = int(run.stdout.readline().split(b":")[2].split(b"/")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while more := connection.recv(4096):  # ends when the server closes
                answer += more
        assert answer.endswith(b'{"live":true}')
        run.terminate()


class Late(Turns):
    """Has its turns long after the limits of time in these tests."""

    def call(self, work: Callable[[], object]) -> None:
        asyncio.get_running_loop().call_later(8, work)


@pytest.fixture
def crowded(tiny_bundle: Bundle, slow: SlowRunner) -> Iterator[Live]:
    """A server that looks at what came so late, but where a limit of time is over."""
    limits = replace(LIMITS, head_s=0.5, keep_alive_s=0.5, body_s=0.5)
    with running(tiny_bundle, slow, limits) as live:
        wait_until_ready(live.address)
        live.server._turns = replace(live.server._turns, looks=Late())
        yield live


def test_what_came_in_time_is_not_late_because_it_waits_to_be_looked_at(crowded: Live) -> None:
    """Neither the first request, nor one on a connection that was idle, nor the end of a body."""
    connection = crowded.connect()
    for pieces in ([GOOD], [GOOD], [GOOD[:-9], GOOD[-9:]]):
        read = sum(each._request for each in _connections(crowded))
        for piece in pieces:
            connection.sendall(piece)
            if piece != pieces[-1]:
                wait_for(lambda read=read: any(e._request > read for e in _connections(crowded)))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_server_that_stops_looks_at_what_came_before_it_gives_up(crowded: Live) -> None:
    crowded.server._limits = replace(crowded.server._limits, body_s=60)
    connection = crowded.connect()
    connection.sendall(GOOD[:-9])
    wait_for(lambda: any(each._part == "body" for each in _connections(crowded)))
    connection.sendall(GOOD[-9:])
    wait_for(lambda: any(each._inbox._pieces for each in _connections(crowded)))
    crowded.server.stop(announced=False)
    assert all_of(connection).startswith(b"HTTP/1.1 200")


def _connections(live: Live) -> list[Connection]:
    return [cast("Connection", each) for each in list(live.server.server_state.connections)]

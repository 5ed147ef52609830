"""Requests without a chance are refused from their heads, on a connection that stays."""

import json
import re
import socket
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.serving.online.http import connection as of_one
from advmoe_deploy.serving.online.http.connection import Connection
from advmoe_deploy.serving.online.http.reading import parse
from advmoe_deploy.serving.online.limits import Limits
from advmoe_deploy.serving.online.operations.requests import Record
from tests.serving.online.live import (
    GOOD,
    INFER,
    ONE,
    Live,
    SlowRunner,
    all_of,
    post,
    request_for,
    running,
    wait_for,
    wait_until_ready,
)

LIMITS = Limits(max_images=5, max_body=1 << 20, queue=5, batch=4)


@pytest.fixture
def told() -> list[Record]:
    """The requests that have ended."""
    return []


@pytest.fixture
def full(tiny_bundle: Bundle, told: list[Record]) -> Iterator[tuple[Live, SlowRunner]]:
    """A server whose queue is full."""
    slow = SlowRunner()
    slow.let_go.set()
    with running(tiny_bundle, slow, LIMITS, watchers=[told.append]) as live:
        wait_until_ready(live.address)
        slow.let_go.clear()
        live.connect().sendall(post(json.dumps(request_for(np.repeat(ONE, 5, axis=0))).encode()))
        wait_for(lambda: live.service.waiting == 5)
        yield live, slow


def answered(connection: socket.socket) -> tuple[int, bytes]:
    """Return status and head of one answer, whose body is read too."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += (more := connection.recv(1))
        assert more, head
    (length,) = re.findall(rb"content-length: (\d+)", head)
    assert b"5 images wait already" in connection.recv(int(length), socket.MSG_WAITALL)
    return int(head[9:12]), head


@pytest.mark.parametrize("target", [INFER, INFER.replace("infer", "image") + "?top=3"])
def test_images_are_refused_from_their_heads_too(
    full: tuple[Live, SlowRunner], told: list[Record], target: str
) -> None:
    """The body is none, which nobody looks at."""
    with full[0].connect() as connection:
        head = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
        connection.sendall(head.encode() + bytes(9))
        assert answered(connection)[0] == 503
    assert told[-1].name == target.partition("?")[0]


def test_a_connection_stays_and_is_answered_once_there_is_room(
    full: tuple[Live, SlowRunner],
) -> None:
    live, slow = full
    connection = live.connect()
    for _ in range(3):
        connection.sendall(GOOD[:-7])
        connection.sendall(GOOD[-7:])
        status, head = answered(connection)
        assert status == 503
        assert b"retry-after: " in head
        assert b"connection: close" not in head
    slow.let_go.set()
    wait_for(lambda: not live.service.waiting)
    connection.sendall(GOOD)
    assert connection.recv(12) == b"HTTP/1.1 200"
    figures = httpx.get(live.url + "/metrics").content
    assert b'advmoe_requests_total{model="advmoe",status="503",version="1"} 3.0' in figures


def test_who_asks_the_same_again_is_refused_without_parsing(
    full: tuple[Live, SlowRunner], told: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    live, slow = full
    parsed: list[bytes] = []

    def spied(reader: Connection, data: bytes) -> None:
        parsed.append(data)
        parse(reader, data)

    monkeypatch.setattr(of_one, "parse", spied)
    client = live.connect()
    for _ in range(3):
        client.sendall(GOOD)
        assert answered(client)[0] == 503
    assert parsed == [GOOD]
    refused = [record for record in told if record.status == 503]
    assert len({record.id for record in refused}) == len(refused) == 3
    # Two at once, another head, and the end of the line behind the body are parsed as before.
    for more, answers in ((GOOD * 2, 2), (GOOD.replace(b"localhost", b"127.0.0.1"), 1)):
        client.sendall(more)
        assert [answered(client)[0] for _ in range(answers)] == [503] * answers
        assert parsed[-1] == more
    for more in (GOOD + b"\r\n", GOOD + b"\r\n", GOOD):
        client.sendall(more)
        assert answered(client)[0] == 503
    slow.let_go.set()
    wait_for(lambda: not live.service.waiting)
    seen = len(parsed)
    client.sendall(GOOD)
    assert client.recv(12) == b"HTTP/1.1 200"
    assert parsed[seen:] == [GOOD]


def test_requests_behind_one_another_are_each_answered(full: tuple[Live, SlowRunner]) -> None:
    live, _ = full
    connection = live.connect()
    connection.sendall(GOOD * 3 + b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert [answered(connection)[0] for _ in range(3)] == [503] * 3
    assert connection.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize(
    "request_",
    [
        post(b"x" * 100, length=900_000),
        GOOD.replace(b"Host", b"Expect: 100-continue\r\nHost")[:200],
        f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode(),
        GOOD.replace(b"Host", b"Connection: close\r\nHost"),
        GOOD.replace(b"HTTP/1.1\r\nHost", b"HTTP/1.0\r\nConnection: keep-alive\r\nHost"),
    ],
    ids=["long", "waits", "chunks", "last", "HTTP/1.0"],
)
def test_bodies_that_are_not_worth_waiting_for_end_the_connection(
    full: tuple[Live, SlowRunner], request_: bytes
) -> None:
    live, _ = full
    connection = live.connect()
    connection.sendall(request_)
    answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"connection: close" in answer
    assert answer.count(b"HTTP/1.1") == 1


def test_other_requests_are_read(full: tuple[Live, SlowRunner]) -> None:
    live, _ = full
    assert httpx.get(live.url + INFER).status_code == 405
    assert httpx.post(live.url + INFER.replace("advmoe", "other")).status_code == 404
    assert httpx.get(live.url + "/v2/health/ready").status_code == 200


def test_a_server_that_stops_answers_half_a_request_without_room(
    full: tuple[Live, SlowRunner],
) -> None:
    live, slow = full
    connection = live.connect()
    connection.sendall(GOOD[:-7])
    wait_for(lambda: len(live.server.server_state.connections) == 2)
    httpx.get(live.url + "/v2/health/live")  # by then the half was read
    live.server.stop(announced=False)
    slow.let_go.set()
    assert all_of(connection).startswith(b"HTTP/1.1 503")


def test_who_is_refused_has_an_id_and_is_told_of(
    full: tuple[Live, SlowRunner], told: list[Record]
) -> None:
    live, _ = full
    mine = GOOD.replace(b"Host", b"X-Request-Id: mine\r\nTraceparent: 00-1\r\nHost")
    connection = live.connect()
    connection.sendall(mine)
    assert b"\r\nx-request-id: mine\r\n" in answered(connection)[1]
    connection.sendall(GOOD)
    assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", answered(connection)[1])
    long = live.connect()
    long.sendall(post(b"x" * 100, "X-Request-Id: long", length=900_000))
    assert b"\r\nx-request-id: long\r\n" in all_of(long)
    connection.sendall(mine[:-1])
    httpx.get(live.url + "/v2/health/live")  # by then the half was read
    connection.close()
    wait_for(lambda: sum(each.infers for each in told) == 4)
    first, second, third, fourth = (each for each in told if each.infers)
    assert (first.id, first.parent, first.method, first.name) == ("mine", "00-1", "POST", INFER)
    assert [each.status for each in (first, second, third, fourth)] == [503, 503, 503, 499]
    assert {each.engine for each in (first, third, fourth)} == {"slow"}
    assert first.model is live.service.model
    assert first.seconds > 0
    figures = httpx.get(live.url + "/metrics").content
    assert b'advmoe_requests_total{model="advmoe",status="503",version="1"} 3.0' in figures
    assert b'advmoe_requests_total{model="advmoe",status="499",version="1"} 1.0' in figures


def test_requests_that_wish_for_another_protocol_are_each_answered(
    full: tuple[Live, SlowRunner],
) -> None:
    live, _ = full
    connection, asked = live.connect(), 1200
    wait_for(lambda: len(live.server.server_state.connections) == 2)
    loop = next(iter(live.server.server_state.connections)).loop
    loop.call_soon_threadsafe(time.sleep, 0.3)  # so that it gets many of them at once
    connection.sendall(post(b"", "Connection: upgrade", "Upgrade: h2c") * asked)
    answers = b""
    while answers.count(b"5 images wait already") < asked:
        answers += (more := connection.recv(1 << 16))
        assert more, answers[-400:]
    assert answers.count(b"HTTP/1.1 503") == asked


def test_answers_that_nobody_reads_do_not_gather(full: tuple[Live, SlowRunner]) -> None:
    live, _ = full
    host, port = live.address.split(":")
    others = {*live.server.server_state.connections}
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect((host, int(port)))
        wait_for(lambda: bool({*live.server.server_state.connections} - others))
        (own,) = {*live.server.server_state.connections} - others
        line = own.transport.get_extra_info("socket")
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        while not own.flow.write_paused:
            client.sendall(post(b"") * 20)
            time.sleep(0.005)
        before = own.transport.get_write_buffer_size()
        client.sendall(post(b"") * 200)
        wait_for(lambda: own._over)
        assert own.transport.get_write_buffer_size() - before < 20 * 300


def test_what_follows_the_last_answer_of_a_connection_is_not_looked_at(
    full: tuple[Live, SlowRunner],
) -> None:
    live, _ = full
    live.server.stopping = True
    connection = live.connect()
    connection.sendall(GOOD * 3)
    assert all_of(connection).count(b"HTTP/1.1 503") == 1
    figures = httpx.get(live.url + "/metrics").content
    assert b'advmoe_requests_total{model="advmoe",status="503",version="1"} 1.0' in figures

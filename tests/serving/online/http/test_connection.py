"""What a connection may send: odd, endless and half requests are answered shortly and closed."""

import gc
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online import server
from advmoe_deploy.serving.online.http.connection import Connection
from advmoe_deploy.serving.online.limits import Limits
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

HOST = b"Host: localhost\r\n"
LIVE = b"GET /v2/health/live HTTP/1.1\r\n" + HOST + b"\r\n"
START = f"POST {INFER} HTTP/1.1\r\n".encode() + HOST
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def live(tiny_bundle: Bundle) -> Iterator[Live]:
    with open_runner(tiny_bundle) as runner, running(tiny_bundle, runner) as live:
        yield live


def refusal_of(answer: bytes) -> tuple[int, str]:
    """Return the status and the error of a whole answer that closes its connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head
    assert b"\r\ncontent-type: application/json" in head
    message = json.loads(body)
    assert list(message) == ["error"]
    assert len(body) < 700
    return int(head.split()[1]), message["error"]


ODD = {
    "another protocol": (b"\x16\x03\x01\x00", 400, "Invalid method"),
    "no version": (b"GET /v2\r\n\r\n", 400, "no HTTP/1.1"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "no HTTP/1.1"),
    "a length and chunks": (
        START + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
        "Content-Length",
    ),
    "chunks and a length": (
        START + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        400,
        "Transfer-Encoding",
    ),
    "two lengths": (START + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400, "Duplicate"),
    "a signed length": (START + b"Content-Length: +3\r\n\r\nabc", 400, "Content-Length"),
    "a length beyond any": (START + b"Content-Length: 1%s\r\n\r\n" % (b"0" * 99), 400, "overflow"),
    "an encoding that hides the end": (START + b"Transfer-Encoding: gzip\r\n\r\n", 400, "invalid"),
    "no chunk": (CHUNKED + b"x\r\n", 400, "chunk"),
    "a folded header": (b"GET / HTTP/1.1\r\nHost: x\r\n y\r\n\r\n", 400, "whitespace"),
    "a tunnel": (b"CONNECT a:1 HTTP/1.1\r\n" + HOST + b"\r\n", 400, "no HTTP/1.1"),
    "many headers": (START + b"a: b\r\n" * 101, 431, "more than 100 headers"),
    "long headers": (START + b"a: %s\r\n" % (b"b" * 9000) * 4, 431, "32768 bytes"),
    "an endless header": (START + b"a: " + b"b" * 90_000, 431, "32768 bytes"),
    "an endless path": (b"GET /" + b"x" * 90_000, 431, "32768 bytes"),
    "an endless trailer": (CHUNKED + b"0\r\na: " + b"b" * 900_000, 431, "32768 bytes"),
    "endless trailers": (CHUNKED + b"0\r\n" + b"a: b\r\n" * 90_000, 431, "32768 bytes"),
    "an endless line of a chunk": (CHUNKED + b"1;" + b"a" * 900_000, 431, "32768 bytes"),
    "a long path": (b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 431, "32768"),
    "a long header": (START + b"a: " + b"b" * 40_000 + b"\r\n\r\n", 431, "32768 bytes"),
    "a long header behind others": (LIVE[:-2] + b"a: b\r\n" * 90 + b"a" * 90_000, 431, "32768"),
    "tiny chunks": (CHUNKED + b"1\r\nx\r\n" * 5000, 400, "shorter than 64 bytes"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_request_is_answered_in_json(live: Live, name: str) -> None:
    request, status, message = ODD[name]
    with live.connect() as connection:
        connection.sendall(request)
        answered, error = refusal_of(all_of(connection))
    assert answered == status
    assert message in error


def test_answers_do_not_wait_for_acknowledgements(live: Live) -> None:
    with live.connect() as connection:
        connection.sendall(LIVE)
        assert connection.recv(4096)
        (own,) = live.server.server_state.connections
        sock = own.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_chunks_of_some_size_are_read(live: Live) -> None:
    body = GOOD.partition(b"\r\n\r\n")[2]
    parts = [body[i : i + 9] for i in range(0, len(body), 9)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    with live.connect() as connection:
        connection.sendall(CHUNKED + chunks + b"0\r\n\r\n")
        assert connection.recv(20).startswith(b"HTTP/1.1 200")


def test_requests_ahead_of_their_answers_are_few(live: Live) -> None:
    with live.connect() as connection:
        connection.sendall(LIVE * 3)
        answers = b""
        while answers.count(b'{"live":true}') < 3:
            answers += connection.recv(4096)
        assert b"connection: close" not in answers
    with live.connect() as connection:
        connection.sendall(LIVE * 50)
        answers = all_of(connection)
    assert answers.count(b"HTTP/1.1 200") == answers.count(b'{"live":true}') < 20
    assert answers.endswith(b'connection: close\r\n\r\n{"live":true}')


def test_a_good_request_is_answered_before_what_follows_it_is_refused(live: Live) -> None:
    with live.connect() as connection:
        connection.sendall(GOOD + b"\x00\x01")
        answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer
    assert answer.count(b"HTTP/1.1") == 1


def test_a_request_is_not_answered_twice(live: Live) -> None:
    with live.connect() as connection:
        connection.sendall(CHUNKED.replace(b"/advmoe/", b"/other/"))
        answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 404")
        connection.sendall(b"no chunk\r\n")
        assert b"HTTP/1.1" not in all_of(connection)


def test_trailers_are_no_headers(live: Live) -> None:
    body = GOOD.partition(b"\r\n\r\n")[2]
    with live.connect() as connection:
        trailer = b"0\r\nHost: elsewhere\r\n\r\n"
        connection.sendall(CHUNKED + b"%x\r\n%b\r\n" % (len(body), body) + trailer)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_empty_lines_do_not_keep_a_connection(tiny_bundle: Bundle) -> None:
    limits = Limits(keep_alive_s=0.3)
    with running(tiny_bundle, SlowRunner(), limits) as live, live.connect() as connection:
        connection.sendall(LIVE)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\r\n")
        assert all_of(connection) == b""


def test_a_request_that_began_ahead_of_an_answer_is_given_its_time(tiny_bundle: Bundle) -> None:
    runner = SlowRunner()
    runner.let_go.set()
    with running(tiny_bundle, runner, Limits(keep_alive_s=0.2)) as live:
        wait_until_ready(live.address)
        runner.let_go.clear()
        with live.connect() as connection:
            connection.sendall(LIVE + GOOD[:5])
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            connection.sendall(GOOD[5:])
            wait_for(lambda: live.service.waiting == 1)
            time.sleep(0.5)
            runner.let_go.set()
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("sent", "part"),
    [
        (b"GET /v2 HTTP/1.1\r\n", "head"),
        (LIVE + b"GET", "head"),
        (post(b"{", length=9), "body"),
        (CHUNKED + b"9\r\n{", "body"),
    ],
)
def test_half_a_request_ends_when_its_time_is_over(
    tiny_bundle: Bundle, sent: bytes, part: str
) -> None:
    limits = Limits(head_s=0.2, body_s=0.3)
    runner = SlowRunner()
    runner.let_go.set()
    with running(tiny_bundle, runner, limits) as live:
        wait_until_ready(live.address)
        with live.connect() as connection:
            connection.sendall(sent)
            answer = all_of(connection)
        wait_for(lambda: live.service.budget.used == 0)
        figures = httpx.get(live.url + "/metrics").text
    assert ('status="408"' in figures) == (part == "body")
    assert 'status="499"' not in figures
    status, message = refusal_of(answer[answer.rindex(b"HTTP/1.1") :])
    assert (status, f"the {part} of the request" in message) == (408, True)


def test_who_does_not_read_is_let_go(tiny_bundle: Bundle) -> None:
    runner = SlowRunner()
    runner.let_go.set()
    body = json.dumps(request_for(np.repeat(ONE, 64, axis=0))).encode()
    with running(tiny_bundle, runner, Limits(body_s=0.3)) as live:
        wait_until_ready(live.address)
        connection = live.connect()
        with pytest.raises(ConnectionError):
            while True:  # each answer of 64 images stays in the line
                connection.sendall(post(body))
        wait_for(lambda: not live.server.server_state.connections)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it, and others do not")
def test_who_leaves_the_end_of_an_answer_unread_is_let_go(
    tiny_bundle: Bundle, slow: SlowRunner
) -> None:
    """What is left is too little for the server to wait with the next answer."""
    body = json.dumps(request_for(np.repeat(ONE, 64, axis=0))).encode()
    with running(tiny_bundle, slow, Limits(body_s=0.3, keep_alive_s=0.1)) as live:
        wait_until_ready(live.address)
        wait_for(lambda: not live.server.server_state.connections)
        host, port = live.address.split(":")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect((host, int(port)))
            wait_for(lambda: len(live.server.server_state.connections) == 1)
            (own,) = live.server.server_state.connections
            line = own.transport.get_extra_info("socket")
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            while not (left := own.transport.get_write_buffer_size()):
                client.sendall(post(body))
                time.sleep(0.01)
            assert left < 64 << 10
            assert not own.flow.write_paused
            wait_for(lambda: not live.server.server_state.connections)


def test_nothing_is_kept_of_a_connection_that_was_reset(live: Live) -> None:
    with live.connect() as connection:
        connection.sendall(LIVE)
        assert connection.recv(4096)
        own = weakref.ref(next(iter(live.server.server_state.connections)))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: gc.collect() >= 0 and own() is None)


def test_a_connection_that_asks_nothing_is_closed(tiny_bundle: Bundle) -> None:
    limits = Limits(head_s=0.2, keep_alive_s=0.1)
    with running(tiny_bundle, SlowRunner(), limits) as live, live.connect() as connection:
        assert all_of(connection) == b""


def test_connections_beyond_the_limit_are_told_and_closed(tiny_bundle: Bundle) -> None:
    with running(tiny_bundle, SlowRunner(), Limits(connections=2)) as live:
        held = [live.connect() for _ in range(2)]
        for connection in held:
            connection.sendall(LIVE)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        with live.connect() as connection:
            connection.sendall(GOOD)
            answer = all_of(connection)
        assert b"retry-after: 1" in answer
        assert refusal_of(answer)[0] == 503
        with live.connect() as probe:  # nobody takes a busy server for a dead one
            probe.sendall(LIVE + LIVE)
            answer = all_of(probe)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.count(b"HTTP/1.1") == 1
        assert b"connection: close" in answer
        held[0].sendall(LIVE)
        assert held[0].recv(100)
        for connection in held:
            connection.close()


def test_many_clients_that_leave_at_once_do_not_keep_others_waiting(
    tiny_bundle: Bundle, slow: SlowRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop finds the ends of 200 connections in one turn, and closes them in several."""
    turns, lost, ticking = [0], [], threading.Event()

    class Watched(Connection):
        def connection_lost(self, exc: Exception | None) -> None:
            lost.append(turns[0])
            super().connection_lost(exc)

    monkeypatch.setattr(server, "Connection", Watched)
    with running(tiny_bundle, slow) as live:
        wait_until_ready(live.address)
        crowd = [live.connect() for _ in range(200)]
        wait_for(lambda: len(live.server.server_state.connections) >= 200)
        lost.clear()
        (own, *_) = live.server.server_state.connections
        loop = own.loop

        def tick() -> None:
            turns[0] += 1
            if not ticking.is_set():
                loop.call_soon(tick)

        loop.call_soon_threadsafe(tick)
        loop.call_soon_threadsafe(time.sleep, 0.3)
        for connection in crowd:
            connection.close()
        wait_for(lambda: len(lost) >= 200)
        ticking.set()
    assert max(Counter(lost).values()) <= 32


def test_the_limit_of_connections_fits_the_descriptors() -> None:
    program = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 600))\n"
        "from advmoe_deploy.serving.online.limits import Limits\n"
        "from advmoe_deploy.serving.online.server import fitting\n"
        "(one, backlog), (each, of_two) = fitting(Limits()), fitting(Limits(), 2)\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], one.connections, backlog)\n"
        "print(each.connections, of_two)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    most, connections, backlog, each_of_two, less = map(int, done.stdout.split())
    assert most == 600
    assert 128 < connections < connections + backlog < 600
    assert 128 < 2 * each_of_two < 2 * each_of_two + less < 600

"""The end of a server: first it is not ready, then it answers what is under way, then it closes."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.serving.online import server
from advmoe_deploy.serving.online.http import infer
from advmoe_deploy.serving.online.http.body import read_request
from advmoe_deploy.serving.online.protocol import InferRequest
from tests.serving.online.live import (
    GOOD,
    LIMITS,
    Live,
    SlowRunner,
    all_of,
    post,
    running,
    wait_for,
    wait_until_ready,
)

READY = b"GET /v2/health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def live(tiny_bundle: Bundle, slow: SlowRunner) -> Iterator[Live]:
    with running(tiny_bundle, slow, LIMITS, drain_s=600) as live:
        wait_until_ready(live.address)
        yield live


def is_closed(live: Live) -> bool:
    try:
        live.connect().close()
    except ConnectionRefusedError:
        return True
    return False


def has_ended(live: Live) -> bool:
    return is_closed(live) and not live.server.server_state.connections


def test_readiness_goes_off_first_and_requests_are_still_answered(live: Live) -> None:
    with live.connect() as kept:
        kept.sendall(GOOD)
        assert b"connection: close" not in kept.recv(4096)
        live.server.stop()
        assert httpx.get(live.url + "/v2/health/ready").status_code == 503
        assert httpx.get(live.url + "/v2/health/live").status_code == 200
        kept.sendall(GOOD)
        answer = all_of(kept)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer
    assert not is_closed(live)
    live.server.stop(announced=False)
    wait_for(lambda: has_ended(live))


def test_what_waits_is_computed_before_the_end(live: Live, slow: SlowRunner) -> None:
    slow.let_go.clear()
    waiting = [live.connect() for _ in range(5)]
    for connection in waiting:
        connection.sendall(GOOD)
    wait_for(lambda: live.service.waiting == 5)
    live.server.stop(announced=False)
    wait_for(lambda: is_closed(live))
    slow.let_go.set()
    for connection in waiting:
        answer = all_of(connection)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer
    wait_for(lambda: has_ended(live))


def test_what_is_being_read_is_answered_before_the_end(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, let_go = threading.Event(), threading.Event()

    def read(*of: Any) -> InferRequest:
        begun.set()
        assert let_go.wait(timeout=30)
        return read_request(*of)

    monkeypatch.setattr(infer, "read_request", read)
    monkeypatch.setattr(infer, "SMALL_BODY", 0)
    monkeypatch.setattr(server, "_READING_S", 0.1)
    with live.connect() as connection:
        connection.sendall(GOOD)
        assert begun.wait(timeout=30)
        live.server.stop(announced=False)
        wait_for(lambda: is_closed(live))
        time.sleep(0.3)
        let_go.set()
        assert all_of(connection).startswith(b"HTTP/1.1 200")
    wait_for(lambda: has_ended(live))


@pytest.mark.parametrize("half", [post(b"{", length=99), b"POST /v2 HTTP/1.1\r\n"])
def test_half_a_request_is_not_waited_for(live: Live, half: bytes) -> None:
    with live.connect() as connection:
        connection.sendall(half)
        wait_for(lambda: len(live.server.server_state.connections) == 1)
        live.server.stop(announced=False)
        answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"stopping" in answer
    wait_for(lambda: has_ended(live))


def test_half_a_request_does_not_cost_the_one_ahead_its_answer(
    live: Live, slow: SlowRunner
) -> None:
    slow.let_go.clear()
    with live.connect() as connection:
        connection.sendall(GOOD + post(b"{", length=99))
        wait_for(lambda: live.service.waiting == 1)
        (own,) = live.server.server_state.connections
        wait_for(lambda: bool(own.pipeline))
        live.server.stop(announced=False)
        wait_for(lambda: not own.pipeline)
        slow.let_go.set()
        answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer
    assert answer.count(b"HTTP/1.1") == 1
    wait_for(lambda: has_ended(live))


def test_idle_connections_are_closed(live: Live) -> None:
    with live.connect() as asked, live.connect() as silent:
        asked.sendall(READY)
        assert asked.recv(4096).startswith(b"HTTP/1.1 200")
        live.server.stop(announced=False)
        assert all_of(asked) == all_of(silent) == b""
    wait_for(lambda: has_ended(live))


def test_in_a_hurry_nothing_is_waited_for(
    live: Live, slow: SlowRunner, capfd: pytest.CaptureFixture[str]
) -> None:
    slow.let_go.clear()
    with live.connect() as connection:
        connection.sendall(GOOD)
        wait_for(lambda: live.service.waiting == 1)
        live.server.stop(announced=False)
        live.server.abandon()
        threading.Timer(0.2, slow.let_go.set).start()  # a batch that runs is never cut off
        assert all_of(connection) == b""
    wait_for(lambda: has_ended(live))
    assert "Traceback" not in capfd.readouterr().err

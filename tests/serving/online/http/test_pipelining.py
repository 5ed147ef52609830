"""Requests ahead of their answers: counted apart, and forgotten once their client has left."""

import gc
import json
import logging
import time
import weakref
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from tests.serving.online.live import (
    GOOD,
    INFER,
    LIMITS,
    ONE,
    Live,
    SlowRunner,
    post,
    request_for,
    running,
    wait_for,
    wait_until_ready,
)

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
UPGRADE = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
MANY = json.dumps(request_for(np.repeat(ONE, 64, axis=0))).encode()


@pytest.fixture
def live(tiny_bundle: Bundle, slow: SlowRunner) -> Iterator[Live]:
    with running(tiny_bundle, slow, LIMITS) as live:
        wait_until_ready(live.address)
        slow.batches.clear()
        yield live


@pytest.mark.parametrize(
    "behind",
    [LIVE, LIVE * 3, GOOD + LIVE, GOOD * 3 + GOOD[:99]],
    ids=["one", "three", "two that infer", "three and a half"],
)
@pytest.mark.parametrize("apart", [False, True], ids=["at once", "later"])
def test_who_leaves_leaves_no_work_and_no_complaint(
    live: Live,
    slow: SlowRunner,
    caplog: pytest.LogCaptureFixture,
    behind: bytes,
    apart: bool,
) -> None:
    slow.let_go.clear()
    first, leaving = live.connect(), live.connect()
    first.sendall(GOOD)
    wait_for(lambda: slow.batches == [1])
    leaving.sendall(post(MANY) + (b"" if apart else behind))
    wait_for(lambda: live.service.waiting == 65)
    if apart:
        leaving.sendall(behind)
        wait_for(lambda: any(each.pipeline for each in live.server.server_state.connections))
    leaving.close()
    wait_for(lambda: len(live.server.server_state.connections) == 1)
    slow.let_go.set()
    assert first.recv(20).startswith(b"HTTP/1.1 200")
    wait_for(lambda: live.service.budget.used == live.service.waiting == 0)
    assert slow.batches == [1]
    figures = httpx.get(live.url + "/metrics").text
    assert 'status="499",version="1"} 1.0' in figures
    assert 'status="5' not in figures
    assert [each for each in caplog.records if each.levelno >= logging.ERROR] == []


def test_nothing_is_kept_of_requests_that_never_began(live: Live, slow: SlowRunner) -> None:
    """Not even until circles are collected, which is seldom."""
    slow.let_go.clear()
    gc.collect()
    gc.disable()
    try:
        with live.connect() as leaving:
            leaving.sendall(GOOD + LIVE)
            wait_for(lambda: slow.batches == [1])
            own = weakref.ref(next(iter(live.server.server_state.connections)))
        slow.let_go.set()
        wait_for(lambda: own() is None)
    finally:
        gc.enable()


def test_long_bodies_wait_in_the_line_behind_a_request_not_in_memory(
    live: Live, slow: SlowRunner
) -> None:
    slow.let_go.clear()
    connection, long = live.connect(), post(b" " * 60_000)
    connection.settimeout(1)
    connection.sendall(GOOD)
    wait_for(lambda: slow.batches == [1])
    (own,) = live.server.server_state.connections
    for _ in range(8):
        connection.sendall(long)
        time.sleep(0.02)
    assert sum(len(cycle.body) for cycle, _ in own.pipeline) <= 3 * 60_000  # type: ignore[union-attr]
    slow.let_go.set()


def test_who_leaves_while_answers_are_written_gets_no_traceback(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(30):
        with live.connect() as connection:
            connection.sendall(post(MANY) + LIVE)
        with live.connect() as connection:
            connection.sendall(post(MANY) + LIVE)
            assert connection.recv(1)
    wait_for(lambda: live.service.budget.used == live.service.waiting == 0)
    wait_for(lambda: not live.server.server_state.connections)
    figures = httpx.get(live.url + "/metrics").text
    assert 'status="5' not in figures
    assert [each for each in caplog.records if each.levelno >= logging.ERROR] == []


def test_the_body_ahead_is_not_counted_as_a_head(live: Live) -> None:
    with live.connect() as connection:
        connection.sendall(post(MANY + b" " * (33 << 10)) + LIVE[:20])
        answers = connection.recv(20)
        connection.sendall(LIVE[20:])
        while not answers.endswith(b'{"live":true}'):
            answers += connection.recv(1 << 16)
    assert answers.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("kind", ["length", "chunks", "nothing"])
def test_the_wish_for_another_protocol_is_ignored(live: Live, kind: str) -> None:
    body = GOOD.partition(b"\r\n\r\n")[2]
    wish = "\r\n".join((*UPGRADE, "", "")).encode()
    request = {
        "length": post(body, *UPGRADE),
        "chunks": CHUNKED[:-2] + wish + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
        "nothing": LIVE[:-2] + wish,
    }[kind]
    for size in (len(request), 100):  # whole, and in pieces
        with live.connect() as connection:
            for start in range(0, len(request), size):
                connection.sendall(request[start : start + size])
            answer = connection.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"connection: close" not in answer
            connection.sendall(request + request + LIVE)
            while not answer.endswith(b'{"live":true}') or answer.count(b"HTTP/1.1 200") < 4:
                answer += connection.recv(1 << 16)
        assert answer.count(b"HTTP/1.1 200") == 4

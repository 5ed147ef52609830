"""More than the server can do: it says so at once, holds little, and is soon free again."""

import json
import math
import threading
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.serving.online.limits import Budget, Limits
from tests.serving.online.live import (
    GOOD,
    INFER,
    ONE,
    Live,
    SlowRunner,
    post,
    request_for,
    running,
    wait_for,
    wait_until_ready,
)

LIMITS = Limits(max_images=8, max_body=1 << 16, queue=10, batch=4, memory=1 << 18)


@pytest.fixture
def slow() -> SlowRunner:
    return SlowRunner()


@pytest.fixture
def live(tiny_bundle: Bundle, slow: SlowRunner) -> Iterator[Live]:
    slow.let_go.set()
    with running(tiny_bundle, slow, LIMITS) as live:
        wait_until_ready(live.address)
        slow.batches.clear()
        slow.let_go.clear()
        yield live
        slow.let_go.set()


@pytest.mark.parametrize("field", ["timeout_s", "body_s", "head_s"])
def test_no_time_at_all_is_no_limit_to_serve_by(field: str) -> None:
    with pytest.raises(UsageError, match="raise --timeout"):
        Limits(**{field: 0.0})


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("delay_s", math.inf, "--delay-ms"),
        ("delay_s", math.nan, "--delay-ms"),
        ("delay_s", -0.001, "--delay-ms"),
        ("keep_alive_s", 1e300, "--keep-alive"),
        ("drain_s", float("inf"), "--drain"),
        ("drain_s", float("nan"), "--drain"),
        ("body_s", math.inf, "--body-timeout"),
        ("queue", 10**30, "images or connections"),
        ("queue", 0, "images or connections"),
        ("connections", 10**30, "images or connections"),
    ],
)
def test_limits_beyond_what_can_be_kept_are_refused(field: str, value: float, flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        Limits(**{field: value})  # type: ignore[arg-type]


def images(count: int) -> bytes:
    return post(json.dumps(request_for(np.repeat(ONE, count, axis=0))).encode())


def test_a_full_queue_is_answered_at_once_with_when_to_retry(live: Live, slow: SlowRunner) -> None:
    waiting = [live.connect() for _ in range(2)]
    for connection in waiting:
        connection.sendall(images(5))
    wait_for(lambda: live.service.waiting == 10)
    answer = httpx.post(live.url + INFER, json=request_for(ONE))
    assert (answer.status_code, list(answer.json())) == (503, ["error"])
    assert int(answer.headers["retry-after"]) >= 1
    assert "10 images wait" in answer.json()["error"]
    assert httpx.get(live.url + "/v2/health/ready").status_code == 200
    slow.let_go.set()
    for connection in waiting:
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
    assert httpx.post(live.url + INFER, json=request_for(ONE)).status_code == 200


def test_clients_that_left_leave_nothing_to_compute(live: Live, slow: SlowRunner) -> None:
    first, *rest = (live.connect() for _ in range(4))
    first.sendall(GOOD)
    wait_for(lambda: slow.batches == [1])
    for connection in rest:
        connection.sendall(images(3))
    wait_for(lambda: live.service.waiting == 10)
    for connection in rest:
        connection.close()
    wait_for(lambda: len(live.server.server_state.connections) == 1)
    last = live.connect()
    last.sendall(images(2))
    wait_for(lambda: live.service.waiting == 3)
    slow.let_go.set()
    assert last.recv(20).startswith(b"HTTP/1.1 200")
    assert slow.batches == [1, 2]
    wait_for(lambda: live.service.budget.used == 0)
    figures = httpx.get(live.url + "/metrics").content
    assert b'advmoe_requests_total{model="advmoe",status="499",version="1"} 3.0' in figures
    assert b'status="503"' not in figures


def test_who_leaves_after_a_long_body_is_noticed_while_it_waits(
    tiny_bundle: Bundle, slow: SlowRunner
) -> None:
    limits = Limits(max_images=1000, max_body=1 << 20, queue=1000, memory=1 << 24)
    slow.let_go.set()
    with running(tiny_bundle, slow, limits) as live:
        wait_until_ready(live.address)
        slow.let_go.clear()
        first, leaves = live.connect(), live.connect()
        first.sendall(GOOD)
        wait_for(lambda: live.service.waiting == 1)
        request, last = images(999), 120_000
        leaves.sendall(request[:-last])
        wait_for(lambda: live.service.reading == 1)
        loop = next(iter(live.server.server_state.connections)).loop
        loop.call_soon_threadsafe(time.sleep, 0.3)  # so that it gets the last piece whole
        leaves.sendall(request[-last:])
        wait_for(lambda: live.service.waiting == 1000)
        leaves.close()
        wait_for(lambda: len(live.server.server_state.connections) == 1)
        slow.let_go.set()
        assert first.recv(20).startswith(b"HTTP/1.1 200")


def test_who_leaves_while_its_batch_runs_is_not_counted_as_answered(
    live: Live, slow: SlowRunner
) -> None:
    leaves = live.connect()
    leaves.sendall(GOOD)
    wait_for(lambda: slow.batches == [1])
    leaves.close()
    wait_for(lambda: not live.server.server_state.connections)
    slow.let_go.set()
    wait_for(lambda: live.service.idle and not live.service.budget.used)
    assert httpx.post(live.url + INFER, json=request_for(ONE)).status_code == 200
    counted = [
        line.partition("{")[2]
        for line in httpx.get(live.url + "/metrics").text.splitlines()
        if line.startswith("advmoe_requests_total")
    ]
    assert sorted(counted) == [
        f'model="advmoe",status="{status}",version="1"}} 1.0' for status in (200, 499)
    ]
    statistics = httpx.get(live.url + "/v2/models/stats").json()["model_stats"][0]
    assert statistics["inference_stats"]["fail"]["count"] == 1


def test_a_share_of_the_memory_ends_with_its_request() -> None:
    budget = Budget(100)
    with budget.hold() as hold:
        assert hold.grow(60)
        assert not hold.grow(101)
    assert budget.used == 0
    with pytest.raises(RuntimeError, match="was given back"):
        hold.grow(1)
    assert budget.used == 0


def test_half_sent_bodies_do_not_hold_more_memory_than_there_is(live: Live) -> None:
    claims = [live.connect() for _ in range(4)]
    for connection in claims:
        connection.sendall(post(b"{", length=60_000))
    wait_for(lambda: live.service.reading == 4)
    assert live.service.budget.used < 100  # heads alone take no memory from anybody
    for connection in claims:
        connection.sendall(b" " * 59_000)
    answers = []
    for connection in claims:
        connection.settimeout(0.5)
        try:
            answers.append(connection.recv(4096))
        except TimeoutError:
            answers.append(b"")
    assert sum(answer.startswith(b"HTTP/1.1 503") for answer in answers) >= 2
    assert live.service.budget.used <= LIMITS.memory
    for connection in claims:
        connection.close()
    wait_for(lambda: live.service.budget.used == 0)


def test_half_a_body_is_expected_for_a_moment_and_a_whole_one_until_it_waits(
    live: Live, slow: SlowRunner
) -> None:
    with live.connect() as half:
        half.sendall(post(b"{", length=9))
        wait_for(lambda: live.service.reading == 1)
        (arrival,) = live.service.arrivals
        assert arrival.heard < math.inf
        wait_for(lambda: not live.service.expecting)
        assert live.service.reading == 1
        arrival.hear(more=False)
        assert live.service.expecting
    wait_for(lambda: live.service.reading == 0)
    assert not live.service.expecting


def test_json_that_comes_as_the_head_of_nothing_is_charged_as_json(
    tiny_bundle: Bundle, slow: SlowRunner
) -> None:
    slow.let_go.set()
    with running(tiny_bundle, slow, Limits()) as live:
        wait_until_ready(live.address)
        header = "Inference-Header-Content-Length: 150000"
        live.connect().sendall(post(b"{", header, length=150_000))
        wait_for(lambda: live.service.budget.used > 0)
        assert live.service.budget.used == 4 * len(b"{")


def test_the_time_that_a_client_gives_is_kept(live: Live, slow: SlowRunner) -> None:
    first = live.connect()
    first.sendall(GOOD)
    wait_for(lambda: slow.batches == [1])
    answers: list[httpx.Response] = []
    body = {**request_for(ONE), "parameters": {"timeout": 1000}}  # microseconds
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(live.url + INFER, json=body))
    )
    asking.start()
    wait_for(lambda: live.service.waiting == 2)
    time.sleep(0.01)
    slow.let_go.set()
    asking.join()
    assert answers[0].status_code == 503
    assert "time was over" in answers[0].json()["error"]
    assert slow.batches == [1]


def test_many_clients_are_answered_in_few_batches(live: Live, slow: SlowRunner) -> None:
    connections = [live.connect() for _ in range(9)]
    connections[0].sendall(GOOD)
    wait_for(lambda: slow.batches == [1])
    for connection in connections[1:]:
        connection.sendall(GOOD)
    wait_for(lambda: live.service.waiting == 9)
    slow.let_go.set()
    for connection in connections:
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
    assert slow.batches == [1, 4, 4]

"""Malformed requests by the hundred, and costly ones: refused, shortly, and forgotten."""

import random
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.limits import Limits
from benchmarks.serving.malformed import costly, hurried, random_request, status_of
from tests.serving.online.live import (
    GOOD,
    INFER,
    ONE,
    Live,
    request_for,
    running,
    wait_for,
    wait_until_ready,
)

# A length that was changed may be one that never comes.
LIMITS = Limits(body_s=2.0)
REFUSED = {400, 404, 405, 408, 413, 415, 421, 431}


@pytest.fixture(scope="module")
def live(tiny_bundle: Bundle) -> Iterator[Live]:
    with open_runner(tiny_bundle) as runner, running(tiny_bundle, runner, LIMITS) as live:
        wait_until_ready(live.address)
        yield live


def assert_well(live: Live, said: str) -> None:
    """Check that the server answers as before, holds nothing and complained of nothing."""
    assert httpx.post(live.url + INFER, json=request_for(ONE)).status_code == 200
    assert live.service.waiting == live.service.budget.used == live.service.reading == 0
    assert said == ""


def test_random_requests_are_answered_or_refused(
    live: Live, capfd: pytest.CaptureFixture[str]
) -> None:
    random.seed(0)
    port = int(live.address.split(":")[1])
    requests = [random_request("advmoe", ONE) for _ in range(400)]
    answers = Counter(status_of(port, request) for request in requests)
    assert answers.keys() <= {200, *REFUSED}, answers
    assert answers[400] > 200
    assert_well(live, capfd.readouterr().err)


def test_requests_ahead_of_their_answers_are_forgotten_with_their_clients(
    live: Live, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    random.seed(0)
    port = int(live.address.split(":")[1])
    for _ in range(100):
        good = [GOOD] * random.randint(0, 3)
        hurried(port, [*good, *(random_request("advmoe", ONE) for _ in range(2))])
    wait_for(lambda: not live.server.server_state.connections)
    wait_for(lambda: live.service.waiting == live.service.reading == 0)
    assert [each.getMessage() for each in caplog.records] == []
    assert 'status="5' not in httpx.get(live.url + "/metrics").text
    assert_well(live, capfd.readouterr().err)


@pytest.mark.slow
def test_costly_requests_are_refused(live: Live, capfd: pytest.CaptureFixture[str]) -> None:
    port = int(live.address.split(":")[1])
    for name, (request, _) in costly("advmoe", ONE).items():
        assert status_of(port, request) in REFUSED, name
    assert_well(live, capfd.readouterr().err)

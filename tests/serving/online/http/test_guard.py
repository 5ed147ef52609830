"""Who may ask: by the name the server is called by, and by the page that sends it."""

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.http.guard import Guard
from advmoe_deploy.serving.online.serve import LOOPBACK
from tests.serving.online.live import INFER, LIMITS, running

OWN = "http://localhost:8000"


@pytest.fixture
def address(tiny_bundle: Bundle) -> Iterator[str]:
    with open_runner(tiny_bundle) as runner, running(tiny_bundle, runner, LIMITS) as live:
        yield live.url


def status_of(hosts: frozenset[str] | None, headers: Mapping[str, str]) -> int:
    async def ok(_: Any) -> PlainTextResponse:
        return PlainTextResponse("ok")

    app = Guard(Starlette(routes=[Route("/", ok, methods=["GET", "POST"])]), hosts)

    async def ask() -> int:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=OWN) as client:
            return (await client.post("/", content=b"x", headers=headers)).status_code

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("localhost.evil.example", 421),
        ("localhost:8000:9", 421),
        ("127.0.0.1@evil.example", 421),
        ("", 421),
    ],
)
def test_only_names_of_this_server_are_answered(host: str, status: int) -> None:
    assert status_of(LOOPBACK, {"Host": host}) == status
    assert status_of(None, {"Host": host}) == 200


def test_two_names_are_refused() -> None:
    names = [("Host", "evil.example"), ("Host", "localhost")]
    for hosts in (LOOPBACK, None):
        assert status_of(hosts, httpx.Headers(names)) == 400


def test_more_names_may_be_allowed() -> None:
    headers = {"Host": "models.example"}
    assert status_of(LOOPBACK, headers) == 421
    assert status_of(LOOPBACK | {"models.example"}, headers) == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": OWN}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost:9000"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 200),  # what curl -d sends
    ],
)
def test_pages_of_other_origins_are_refused(headers: dict[str, str], status: int) -> None:
    for hosts in (LOOPBACK, None):
        assert status_of(hosts, headers) == status


def test_the_server_guards_every_place(address: str) -> None:
    for path in ("/v2", INFER, "/nowhere"):
        answer = httpx.post(address + path, headers={"Host": "evil.example"}, content=b"x")
        assert (answer.status_code, list(answer.json())) == (421, ["error"])

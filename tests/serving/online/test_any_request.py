"""Whatever a client asks, at any address and of any call: an answer, or the client's own fault."""

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import grpc
import numpy as np
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.grpc.calls import SERVICE
from advmoe_deploy.serving.online.http.openapi import description
from advmoe_deploy.serving.online.limits import Limits
from tests.serving.online.live import ONE, Live, request_for, running, wait_until_ready

LIMITS = Limits(max_images=4, max_body=1 << 20, window=0)
# The same examples each time: what chance finds on some machine, nobody could repeat.
thorough = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

NAMES = st.sampled_from(["advmoe", "1", "images", "logits", "FP32", "UINT8", "top"])
WORDS = NAMES | st.text(max_size=9)
NUMBERS = st.integers(-1, 9) | st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_subnormal=False)  # which our engines have the processor take for 0
JSON: SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | FLOATS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=9,
)
GOOD = request_for(ONE)
TENSOR = GOOD["inputs"][0]


def perhaps(value: Any) -> SearchStrategy[Any]:
    """Return ``value`` four times of five, or anything."""
    # Not ``one_of``, which would give each of the many branches of ``JSON`` as much as ``value``.
    return st.integers(0, 4).flatmap(lambda number: st.just(value) if number else JSON)


INFERENCES = st.fixed_dictionaries(
    {
        "inputs": st.lists(
            st.fixed_dictionaries(
                {name: perhaps(value) for name, value in TENSOR.items()},
                optional={"parameters": st.dictionaries(WORDS, JSON, max_size=2)},
            ),
            min_size=1,
            max_size=2,
        )
    },
    optional={
        "id": perhaps("7"),
        "parameters": st.dictionaries(WORDS | st.just("timeout"), JSON, max_size=2),
        "outputs": perhaps([{"name": "logits", "parameters": {"classification": 2}}]),
    },
)
BODIES = st.one_of(
    st.just(b""),
    st.binary(max_size=99),
    st.one_of(JSON, INFERENCES, INFERENCES).map(lambda value: json.dumps(value).encode()),
)
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"))
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            *("Accept-Encoding", "Authorization", "Content-Encoding", "Content-Type", "Origin"),
            *("Inference-Header-Content-Length", "Range", "Traceparent", "X-Request-Id"),
        ]
    ),
    st.sampled_from(["gzip", "deflate", "application/json", "image/png", "0", "9"]) | VALUES,
    max_size=3,
)
METHODS = st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
QUERIES = st.just("") | st.dictionaries(WORDS, WORDS, max_size=2).map(
    lambda asked: "?" + "&".join(f"{quote(key)}={quote(asked[key])}" for key in asked)
)


@st.composite
def addresses(draw: st.DrawFn) -> tuple[str, str]:
    """Return a method and an address: one of those described, mostly by a method that it has."""
    path = draw(st.sampled_from(sorted(described := description()["paths"])))
    own = st.sampled_from([each.upper() for each in described[path]])
    names = {
        "name": draw(st.one_of(*[st.just("advmoe")] * 3, WORDS)),
        "version": draw(st.one_of(*[st.just("1")] * 3, WORDS)),
    }
    filled = path.format(**{key: quote(value, safe="") for key, value in names.items()})
    return draw(own | own | METHODS), filled + draw(QUERIES)


@st.composite
def contents(draw: st.DrawFn, kind: Any, depth: int = 3) -> dict[str, Any]:
    """Return fields of a message of protobuf, of which some are left out."""
    found: dict[str, Any] = {}
    chosen = set[str]()  # of each group one field alone
    for field in kind.fields:
        group = field.containing_oneof and field.containing_oneof.name
        if group in chosen or not draw(st.booleans()):
            continue
        chosen |= {group} if group else set()
        entries = field.message_type is not None and field.message_type.GetOptions().map_entry
        value = value_of(field.message_type.fields_by_name["value"] if entries else field, depth)
        if entries:
            value = st.dictionaries(WORDS, value, max_size=2)
        elif field.is_repeated:
            value = st.lists(value, max_size=3)
        found[field.name] = draw(value)
    return found


def value_of(field: Any, depth: int) -> SearchStrategy[Any]:
    """Return values of one field, as protobuf's JSON has them."""
    if field.message_type is not None:
        return contents(field.message_type, depth - 1) if depth else st.just({})
    simple: dict[int, SearchStrategy[Any]] = {
        field.CPPTYPE_BOOL: st.booleans(),
        field.CPPTYPE_STRING: WORDS if field.type != field.TYPE_BYTES else st.just("AAAAPw=="),
        field.CPPTYPE_INT64: NUMBERS,
        field.CPPTYPE_INT32: st.integers(-9, 9),
        field.CPPTYPE_UINT32: st.integers(0, 9),
        field.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
        field.CPPTYPE_FLOAT: st.floats(-9, 9, width=32, allow_subnormal=False),
        field.CPPTYPE_DOUBLE: st.floats(-9, 9, allow_subnormal=False),
    }
    return simple[field.cpp_type]


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, bytes]:
    """Return the name of a call and a message: of its kind, cut off or damaged, or any bytes."""
    method = draw(st.sampled_from(sorted(SERVICE.methods, key=lambda method: method.name)))
    fields = draw(contents(method.input_type))
    message = ParseDict(fields, GetMessageClass(method.input_type)()).SerializeToString()
    cut = message[: draw(st.integers(0, len(message)))]
    return method.name, draw(st.sampled_from([message, message, cut, draw(st.binary())]))


@pytest.fixture(scope="module")
def live(tiny_bundle: Bundle) -> Iterator[Live]:
    with (
        open_runner(tiny_bundle) as runner,
        running(tiny_bundle, runner, LIMITS, again=lambda: tiny_bundle) as live,
    ):
        wait_until_ready(live.address)
        yield live


def test_any_request_is_answered_or_the_clients_fault(
    live: Live, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    host, port = live.address.split(":")
    seen = set[int]()

    @thorough
    @given(addresses(), HEADERS, BODIES)
    def ask(address: tuple[str, str], headers: dict[str, str], body: bytes) -> None:
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        connection.request(*address, body, {k: v.encode("latin-1") for k, v in headers.items()})  # type: ignore[arg-type]
        answer = connection.getresponse()
        said = answer.read()
        connection.close()
        seen.add(answer.status)
        is_unload = answer.status == 501 and "/unload" in address[1]
        assert answer.status < 500 or is_unload, said
        if answer.status >= 400 and address[0] != "HEAD":
            assert list(json.loads(said)) == ["error"]

    ask()
    assert {200, 400, 404, 405} <= seen
    assert [each.getMessage() for each in caplog.records] == []
    assert capfd.readouterr().err == ""


def test_any_call_is_answered_or_the_clients_fault(
    live: Live, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    codes, seen = grpc.StatusCode, set[grpc.StatusCode]()
    allowed = {codes.OK, codes.INVALID_ARGUMENT, codes.NOT_FOUND, codes.UNIMPLEMENTED}

    with grpc.insecure_channel(live.grpc) as channel:

        @thorough
        @given(calls())
        def ask(call: tuple[str, bytes]) -> None:
            name, message = call
            code = codes.OK
            try:
                channel.unary_unary(f"/{SERVICE.full_name}/{name}")(message, timeout=60)
            except grpc.RpcError as error:
                code = error.code()
            seen.add(code)
            assert code in allowed, (name, code)

        ask()
    assert seen == allowed
    assert [each.getMessage() for each in caplog.records] == []
    assert capfd.readouterr().err == ""


def test_a_good_request_is_among_them() -> None:
    """Else what is drawn would be refused by its first field, and the rest never looked at."""
    found: list[Any] = []

    @thorough
    @given(INFERENCES)
    def look(value: dict[str, Any]) -> None:
        found.append(value["inputs"][0] == TENSOR)

    look()
    assert np.mean(found) > 0.02

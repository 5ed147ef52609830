"""Every answer has the id of its request: the client's own, or a new one."""

import re
from collections.abc import Iterator

import grpc
import httpx
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.serving.online.operations.requests import Record
from tests.serving.online.live import (
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

OWN = re.compile(r"[0-9a-f]{32}")
STRANGE = ["", "a b", "a" * 129, "a~", "a,b", "ä", '"', "a;b=c"]


class FailingRunner(SlowRunner):
    """Answers what no answer can be made of where an image is white."""

    def infer(self, images: np.ndarray) -> Prediction:
        if images.max() == 1:
            raise ZeroDivisionError("white\nERROR forged")
        return super().infer(images)


@pytest.fixture(scope="module")
def live(tiny_bundle: Bundle) -> Iterator[Live]:
    runner = FailingRunner()
    runner.let_go.set()
    with running(tiny_bundle, runner) as live:
        while httpx.get(live.url + "/v2/health/ready").status_code != 200:
            pass
        yield live


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/health/live", 200),
        ("HEAD", "/v2/health/ready", 200),
        ("GET", "/", 200),
        ("GET", "/metrics", 200),
        ("GET", "/v2/models/none", 404),
        ("GET", "/nowhere", 404),
        ("DELETE", "/v2", 405),
        ("POST", INFER, 400),
        ("POST", INFER.replace("infer", "image"), 400),
    ],
)
def test_every_answer_has_an_id(live: Live, method: str, path: str, status: int) -> None:
    given = {"X-Request-Id": "Az0._-"}
    answer = httpx.request(method, live.url + path, headers=given)
    assert answer.status_code == status
    assert answer.headers.get_list("x-request-id") == ["Az0._-"]
    answer = httpx.request(method, live.url + path)
    assert OWN.fullmatch(answer.headers["x-request-id"])


def test_answers_to_inference_and_refusals_have_an_id(live: Live) -> None:
    given = {"X-Request-Id": "a" * 128}
    with httpx.Client(base_url=live.url, headers=given) as client:
        answers = [
            client.post(INFER, json=request_for(ONE)),
            client.post(INFER, json=request_for(ONE), headers={"Host": "evil.example"}),
            client.post(INFER, json=request_for(np.ones_like(ONE))),  # the engine fails
        ]
    assert [each.status_code for each in answers] == [200, 421, 500]
    assert {each.headers["x-request-id"] for each in answers} == {"a" * 128}


@pytest.mark.parametrize("strange", STRANGE)
def test_what_is_no_id_is_not_repeated(live: Live, strange: str) -> None:
    answer = httpx.get(live.url + "/v2/health/live", headers={"X-Request-Id": strange.encode()})
    assert OWN.fullmatch(answer.headers["x-request-id"])


def test_each_request_has_an_id_of_its_own(live: Live) -> None:
    with httpx.Client(base_url=live.url) as client:
        ids = {client.get("/v2").headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5


def test_calls_have_an_id(live: Live) -> None:
    message = service_pb2.ModelInferRequest(model_name="advmoe")
    tensor = message.inputs.add(name="images", datatype="FP32", shape=ONE.shape)
    message.raw_input_contents.append(ONE.tobytes())
    assert list(tensor.shape) == list(ONE.shape)
    with grpc.insecure_channel(live.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        _, call = stub.ModelInfer.with_call(message, metadata=(("x-request-id", "mine"),))
        assert dict(call.initial_metadata())["x-request-id"] == "mine"
        _, call = stub.ServerLive.with_call(service_pb2.ServerLiveRequest())
        assert OWN.fullmatch(dict(call.initial_metadata())["x-request-id"])
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelReady(
                service_pb2.ModelReadyRequest(name="none"), metadata=(("x-request-id", "mine"),)
            )
    # Before the end there is nothing, for else clients would not ask another server.
    assert "x-request-id" not in dict(refused.value.initial_metadata())
    assert dict(refused.value.trailing_metadata())["x-request-id"] == "mine"


def test_whoever_has_read_a_refusal_has_not_left(tiny_bundle: Bundle, slow: SlowRunner) -> None:
    """What is refused unread lingers for the rest of its body, which the client does not send."""
    image = INFER.replace("infer", "image").encode()
    long = post(b"x", length=60 << 20)
    requests = {
        413: long,
        415: long.replace(INFER.encode(), image).replace(
            b"Host", b"Content-Type: text/plain\r\nHost"
        ),
        400: long.replace(INFER.encode(), image + b"?top=0"),
        499: post(b"x", length=100),
    }
    told: list[Record] = []
    with running(tiny_bundle, slow, watchers=[told.append]) as live:
        wait_until_ready(live.address)
        for status, request in requests.items():
            connection = live.connect()
            connection.sendall(request)
            if status != 499:
                assert connection.recv(12) == b"HTTP/1.1 %d" % status
                while not connection.recv(1 << 16).endswith(b"}"):
                    pass
            connection.close()
        wait_for(lambda: sum(each.infers for each in told) == len(requests))
    assert {each.status for each in told if each.infers} == {*requests}

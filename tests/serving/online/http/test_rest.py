"""The Open Inference Protocol over real HTTP, by hand and by a stock client."""

import contextlib
import copy
import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from numpy.typing import NDArray

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import MachineError, UsageError
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.http.body import read_request
from advmoe_deploy.serving.online.offers import Offer
from advmoe_deploy.serving.online.protocol import RefusedError, served_model
from advmoe_deploy.serving.online.serve import serve
from tests.serving.online.live import (
    INFER,
    LIMITS,
    ONE,
    request_for,
    served,
    wait_until_ready,
)


@pytest.fixture(scope="module")
def address(tiny_bundle: Bundle) -> Iterator[str]:
    with open_runner(tiny_bundle) as runner, served(tiny_bundle, runner) as address:
        wait_until_ready(address)
        yield address


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{address}") as client:
        yield client


@pytest.fixture(scope="module")
def images() -> NDArray[np.float32]:
    return to_float(load_dataset("digits").test.images[:6])


@pytest.fixture(scope="module")
def expected(tiny_bundle: Bundle, images: NDArray[np.float32]) -> Prediction:
    with open_runner(tiny_bundle) as runner:
        return runner.infer(images)


def test_the_server_and_the_model_describe_themselves(client: httpx.Client) -> None:
    assert client.get("/v2").json()["name"] == "advmoe-deploy"
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    metadata = client.get("/v2/models/advmoe").json()
    assert metadata["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
    names = [output["name"] for output in metadata["outputs"]]
    assert names == ["logits", "router.expert_ids", "router.weights"]
    assert client.get("/v2/models/advmoe/versions/1").json() == metadata
    assert client.get("/v2/models/advmoe/ready").json() == {"name": "advmoe", "ready": True}


@pytest.mark.parametrize("path", ["", "/health/live", "/health/ready", "/models/advmoe"])
def test_probes_may_ask_for_the_head_alone(client: httpx.Client, path: str) -> None:
    whole, head = client.get(f"/v2{path}"), client.head(f"/v2{path}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))
    for place, status in (("/models/advmoe/ready", 200), ("/models/other", 404), ("/x", 404)):
        assert client.head(f"/v2{place}").status_code == status
    wrong = client.head(INFER)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


def test_flat_and_nested_data_get_the_runners_answer(
    client: httpx.Client, images: NDArray[np.float32], expected: Prediction
) -> None:
    for data in (images.ravel().tolist(), images.tolist()):
        answer = client.post(INFER, json={**request_for(images, data=data), "id": "seven"}).json()
        assert (answer["id"], answer["model_name"]) == ("seven", "advmoe")
        tensors = {t["name"]: np.reshape(t["data"], t["shape"]) for t in answer["outputs"]}
        np.testing.assert_allclose(tensors["logits"], expected.logits, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(tensors["router.expert_ids"], expected.expert_ids["router"])
        np.testing.assert_allclose(tensors["router.weights"], expected.weights["router"])


def test_only_what_was_asked_for_comes_back(
    client: httpx.Client, images: NDArray[np.float32]
) -> None:
    request = {**request_for(images), "outputs": [{"name": "router.expert_ids"}]}
    (output,) = client.post(INFER, json=request).json()["outputs"]
    assert (output["name"], output["datatype"]) == ("router.expert_ids", "INT64")
    assert output["shape"] == [6, 1]


def test_many_requests_on_one_connection(client: httpx.Client, images: NDArray[np.float32]) -> None:
    for count in (1, 6, 2):
        answer = client.post(INFER, json=request_for(images[:count]))
        assert answer.json()["outputs"][0]["shape"] == [count, 10]
        assert client.post(INFER, content=b"{").headers.get("connection") != "close"


BAD_REQUESTS = {
    "not JSON": (b"{", 400, "no JSON"),
    "not text": (b"\xff\xfe", 400, "no JSON"),
    "a list": (b"[]", 400, "dictionary"),
    "deep": (b"[" * 100_000, 400, "no JSON"),
    "no inputs": ({"inputs": []}, 400, "exactly one"),
    "another input": (request_for(ONE, name="pixels"), 400, "pixels"),
    "another dtype": (request_for(ONE, datatype="INT8"), 400, "INT8"),
    "another size": (request_for(ONE, shape=[1, 1, 4, 16]), 400, "takes [N, 1, 8, 8]"),
    "no batch": (request_for(ONE, shape=[1, 8, 8]), 400, "takes"),
    "an empty batch": (request_for(ONE, shape=[0, 1, 8, 8], data=[]), 400, "takes"),
    "a negative batch": (request_for(ONE, shape=[-1, 1, 8, 8]), 400, "takes"),
    "a batch of floats": (request_for(ONE, shape=[1.5, 1, 8, 8]), 400, "shape"),
    "a huge batch": (request_for(ONE, shape=[65, 1, 8, 8]), 400, "limit of 64"),
    "too little data": (request_for(ONE, data=[0.5] * 63), 400, "does not fit"),
    "ragged data": (request_for(ONE, data=[[0.5], [0.5, 0.5]]), 400, "nested"),
    "no data": (request_for(ONE, data=None), 400, "neither data"),
    "words": (request_for(ONE, data=["0.5"] * 64), 400, "numbers"),
    "nulls": (request_for(ONE, data=[None] * 64), 400, "numbers"),
    "booleans": (request_for(ONE, data=[True] * 64), 400, "numbers"),
    "above 1": (request_for(ONE * 255), 400, "scale it"),
    "below 0": (request_for(-ONE), 400, "scale it"),
    "1e300": (request_for(ONE, data=[1e300] * 64), 400, "scale it"),
    "a time beyond any": (
        {**request_for(ONE), "parameters": {"timeout": 10**400}},
        400,
        "parameters.timeout",
    ),
    "a huge integer": (request_for(ONE, data=[10**40] * 64), 400, "numbers"),
    "binary without its header": (
        request_for(ONE, data=None, parameters={"binary_data_size": 256}),
        400,
        "Inference-Header-Content-Length",
    ),
    "unknown output": (
        {**request_for(ONE), "outputs": [{"name": "logit"}]},
        400,
        "the model has logits, router.expert_ids",
    ),
    "classification": (
        {**request_for(ONE), "outputs": [{"name": "logits", "parameters": {"classification": -2}}]},
        400,
        "ask for 1 class or more",
    ),
    "an id that is no text": ({**request_for(ONE), "id": 7}, 400, "id"),
    "a large body": (b" " * 200_001, 413, "limit of 200000"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_refused(client: httpx.Client, name: str) -> None:
    body, status, message = BAD_REQUESTS[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(INFER, content=content)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert message in answer.json()["error"]


def test_names_of_any_characters_are_answered_in_json(client: httpx.Client) -> None:
    for name in ("\ud800", "\x00\n", "é" * 10_000, "\u2028"):
        for body in (
            request_for(ONE, name=name),
            request_for(ONE, datatype=name),
            {**request_for(ONE), "outputs": [{"name": name}]},
            {**request_for(ONE), "parameters": {name: []}},
        ):
            answer = client.post(INFER, content=json.dumps(body))
            assert (answer.status_code, list(answer.json())) == (400, ["error"])
            assert "\n" not in answer.json()["error"]
            assert len(answer.content) < 1000
    answer = client.get("/v2/models/%00%ff" + "x" * 10_000)
    assert answer.status_code == 404
    assert len(answer.content) < 1000


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_values_that_are_not_finite_are_refused(client: httpx.Client, value: str) -> None:
    body = json.dumps(request_for(ONE)).replace("0.5", value, 1)
    answer = client.post(INFER, content=body)
    assert (answer.status_code, "not finite" in answer.json()["error"]) == (400, True)


def test_unknown_places_are_404(client: httpx.Client) -> None:
    for path in ("/v2/models/other", "/v2/models/advmoe/versions/2", "/v1", "/v2/health/live/"):
        answer = client.get(path)
        assert (answer.status_code, list(answer.json())) == (404, ["error"])
    assert client.post("/v2/models/other/infer", json=request_for(ONE)).status_code == 404
    assert client.get(INFER).status_code == 405
    assert client.post(INFER, content=b"x", headers={"content-encoding": "br"}).status_code == 415


def test_an_encoding_that_changes_nothing_is_taken(client: httpx.Client) -> None:
    headers = {"content-encoding": "Identity"}
    assert client.post(INFER, json=request_for(ONE), headers=headers).status_code == 200


def test_a_body_without_a_length_is_limited_too(client: httpx.Client) -> None:
    answer = client.post(INFER, content=(b" " * 10_000 for _ in range(30)))
    assert answer.status_code == 413


def test_a_claimed_length_is_refused_before_the_body_comes(address: str) -> None:
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(
            f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n".encode()
        )
        assert b" 413 " in connection.recv(4096)


def test_bad_binary_tensors_are_refused(client: httpx.Client) -> None:
    header = json.dumps(request_for(ONE, data=None, parameters={"binary_data_size": 256})).encode()
    for body, length in (
        (header + bytes(255), str(len(header))),
        (header + bytes(256), str(len(header) + 999)),
        (header + bytes(256), "-1"),
        (header + bytes(256), "words"),
        (header + np.full(64, np.nan, dtype=np.float32).tobytes(), str(len(header))),
    ):
        answer = client.post(
            INFER, content=body, headers={"Inference-Header-Content-Length": length}
        )
        assert (answer.status_code, list(answer.json())) == (400, ["error"])


@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize("binary_out", [False, True])
def test_the_stock_client_gets_the_runners_answer(
    address: str,
    images: NDArray[np.float32],
    expected: Prediction,
    binary_in: bool,
    binary_out: bool,
) -> None:
    client = triton.InferenceServerClient(address)
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("advmoe")
        assert client.get_model_metadata("advmoe")["versions"] == ["1"]
        tensor = triton.InferInput("images", list(images.shape), "FP32")
        tensor.set_data_from_numpy(images, binary_data=binary_in)
        outputs = [
            triton.InferRequestedOutput(name, binary_data=binary_out)
            for name in ("logits", "router.expert_ids")
        ]
        answer = client.infer("advmoe", [tensor], outputs=outputs, request_id="7")
    finally:
        client.close()
    assert answer.get_response()["id"] == "7"
    np.testing.assert_allclose(answer.as_numpy("logits"), expected.logits, rtol=1e-5, atol=1e-6)
    ids = answer.as_numpy("router.expert_ids")
    np.testing.assert_array_equal(ids, expected.expert_ids["router"])


def test_no_message_raises_anything_but_a_refusal(tiny_bundle: Bundle) -> None:
    model = served_model(tiny_bundle, limits=LIMITS)
    junk = [None, True, -1, 0, 1.5, 10**30, 1e300, "", "FP32", [], [[]], {}, {"a": [1]}, [None]]
    random.seed(0)
    for _ in range(2000):
        message = {
            **request_for(ONE, parameters={"binary_data_size": 256}),
            "id": "7",
            "parameters": {"binary_data_output": True},
            "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
        }
        for _ in range(random.randint(1, 3)):
            place: Any = message
            while isinstance(place, dict | list) and place:
                keys = list(place) if isinstance(place, dict) else range(len(place))
                key = random.choice(keys)
                if random.random() < 0.4 or not isinstance(place[key], dict | list):
                    place[key] = copy.deepcopy(random.choice(junk))
                    break
                place = place[key]
        text = json.dumps(message).encode()
        tail = ONE.tobytes()[: random.choice([0, 255, 256])]
        with contextlib.suppress(RefusedError):
            read_request(text + tail, random.choice([None, len(text)]), model)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_only_loopback_without_insecure(tiny_bundle: Bundle, host: str) -> None:
    with pytest.raises(UsageError, match="--insecure"):
        serve([Offer(tiny_bundle)], host, 0)


def test_names_are_allowed_on_the_loopback_alone(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="--allow-host"):
        serve([Offer(tiny_bundle)], "0.0.0.0", 0, insecure=True, hosts=["cats.example"])


def test_a_port_in_use_is_the_machines_fault(tiny_bundle: Bundle, address: str) -> None:
    with pytest.raises(MachineError, match="in use"):
        serve([Offer(tiny_bundle)], "127.0.0.1", int(address.split(":")[1]))
    with pytest.raises(UsageError, match="outside 0"):
        serve([Offer(tiny_bundle)], "127.0.0.1", 70_000)

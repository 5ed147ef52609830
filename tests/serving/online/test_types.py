"""Other types than float32, classes as text, and compressed bodies: the same by both protocols."""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as by_grpc
import tritonclient.http as by_http
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.runtime.select import open_runner
from tests.serving.online.live import INFER, LIMITS, ONE, Live, request_for, running

PIXELS = load_dataset("digits").test.images[:40]
IMAGES = to_float(PIXELS)
BOTH = pytest.mark.parametrize("protocol", [by_http, by_grpc])


@pytest.fixture(scope="module")
def live(tiny_bundle: Bundle) -> Iterator[Live]:
    with open_runner(tiny_bundle) as runner, running(tiny_bundle, runner) as live:
        while httpx.get(live.url + "/v2/health/ready").status_code != 200:
            pass
        yield live


@pytest.fixture(scope="module")
def expected(tiny_bundle: Bundle) -> Prediction:
    with open_runner(tiny_bundle) as runner:
        return runner.infer(IMAGES)


def infer(live: Live, protocol: Any, images: NDArray[Any], datatype: str, **options: Any) -> Any:
    address = live.address if protocol is by_http else live.grpc
    tensor = protocol.InferInput("images", list(images.shape), datatype)
    tensor.set_data_from_numpy(images)
    with protocol.InferenceServerClient(address) as client:
        return client.infer("advmoe", [tensor], **options)


@BOTH
def test_pixels_as_files_have_them_are_the_same_images(
    live: Live, expected: Prediction, protocol: Any
) -> None:
    answer = infer(live, protocol, PIXELS, "UINT8")
    np.testing.assert_array_equal(answer.as_numpy("logits"), expected.logits)


@BOTH
def test_half_precision_is_what_it_is_as_float32(
    live: Live, tiny_bundle: Bundle, protocol: Any
) -> None:
    half = IMAGES.astype(np.float16)
    with open_runner(tiny_bundle) as runner:
        own = runner.infer(half.astype(np.float32)).logits
    np.testing.assert_array_equal(infer(live, protocol, half, "FP16").as_numpy("logits"), own)
    half[3, 0, 2, 2] = np.nan
    with pytest.raises(InferenceServerException, match="not finite"):
        infer(live, protocol, half, "FP16")


@BOTH
@pytest.mark.parametrize("count", [1, 3, 99])
def test_the_best_classes_are_told_as_text(
    live: Live, tiny_bundle: Bundle, expected: Prediction, protocol: Any, count: int
) -> None:
    wanted = [protocol.InferRequestedOutput("logits", class_count=count)]
    texts = infer(live, protocol, IMAGES, "FP32", outputs=wanted).as_numpy("logits")
    assert texts.shape == (len(IMAGES), min(count, 10))
    names = tiny_bundle.manifest.class_names
    for row, logits in zip(texts, expected.logits, strict=True):
        order = sorted(range(10), key=lambda index: -logits[index])
        for text, index in zip(row, order, strict=False):
            value, number, label = text.decode().split(":")
            assert (int(number), label) == (index, names[index])
            assert np.float32(value) == logits[index]


@BOTH
def test_classes_are_those_of_logits(live: Live, protocol: Any) -> None:
    for name, count in (("router.weights", 1), ("logits", -1)):
        wanted = [protocol.InferRequestedOutput(name, class_count=count)]
        with pytest.raises(InferenceServerException, match="classification"):
            infer(live, protocol, ONE, "FP32", outputs=wanted)


def test_both_are_written_as_json(live: Live, expected: Prediction) -> None:
    outputs = [{"name": "logits", "parameters": {"classification": 2}}]
    request = {**request_for(PIXELS, datatype="UINT8"), "outputs": outputs}
    (answer,) = httpx.post(live.url + INFER, json=request).json()["outputs"]
    assert (answer["datatype"], answer["shape"]) == ("BYTES", [len(PIXELS), 2])
    best = [int(text.split(":")[1]) for text in answer["data"][::2]]
    np.testing.assert_array_equal(best, expected.logits.argmax(axis=1))
    assert "classification" in httpx.get(live.url + "/v2").json()["extensions"]


@pytest.mark.parametrize("pixel", [-1, 256, 0.5, 1e39])
def test_numbers_that_are_no_bytes_are_refused(live: Live, pixel: float) -> None:
    request = request_for(ONE, datatype="UINT8", data=[pixel] * 64)
    answer = httpx.post(live.url + INFER, json=request)
    assert answer.status_code == 400
    assert "from 0 to 255" in answer.json()["error"]


def test_numbers_are_not_written_in_half_precision(live: Live) -> None:
    answer = httpx.post(live.url + INFER, json=request_for(ONE, datatype="FP16"))
    assert answer.status_code == 400
    assert "FP16 is for binary tensors" in answer.json()["error"]


@BOTH
@pytest.mark.parametrize("datatype", ["UINT8", "FP16"])
def test_bytes_of_another_type_are_refused(live: Live, protocol: Any, datatype: str) -> None:
    with pytest.raises((InferenceServerException, ValueError)):
        infer(live, protocol, IMAGES, datatype)


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
def test_bodies_are_unpacked_and_packed(live: Live, expected: Prediction, packing: str) -> None:
    packed: dict[str, Any] = {"request_compression_algorithm": packing}
    for options in (packed, packed | {"response_compression_algorithm": "gzip"}):
        answer = infer(live, by_http, IMAGES, "FP32", **options)
        np.testing.assert_array_equal(answer.as_numpy("logits"), expected.logits)


@pytest.mark.parametrize(
    ("accepted", "packs"),
    [
        ("gzip", True),
        ("deflate, GZIP;q=0.5", True),
        ("gzip;q=0", False),
        ("gzip;q=0.00, br", False),
        ("x-gzip-not", False),
        ("identity", False),
    ],
)
def test_answers_are_packed_for_who_accepts_it(live: Live, accepted: str, packs: bool) -> None:
    headers = {"accept-encoding": accepted}
    long = httpx.post(live.url + INFER, json=request_for(IMAGES), headers=headers)
    assert ("content-encoding" in long.headers) == packs
    assert len(long.json()["outputs"][0]["data"]) == 10 * len(IMAGES)
    short = httpx.post(live.url + INFER, json=request_for(ONE), headers=headers)
    assert "content-encoding" not in short.headers


def packed_request(images: NDArray[np.float32]) -> bytes:
    return gzip.compress(json.dumps(request_for(images)).encode(), mtime=0)


@pytest.mark.parametrize(
    ("body", "encoding", "status", "reason"),
    [
        (packed_request(ONE)[:-9], "gzip", 400, "cut off"),
        (packed_request(ONE) + b"x", "gzip", 400, "behind the end"),
        (packed_request(ONE) * 2, "gzip", 400, "behind the end"),
        (b"xx", "gzip", 400, "not what its content-encoding says"),
        (b"", "gzip", 400, "cut off"),
        (packed_request(ONE), "deflate", 400, "not what its content-encoding says"),
        (zlib.compress(bytes(LIMITS.max_body + 1)), "deflate", 413, "exceeds the limit"),
        (gzip.compress(bytes(64 << 20), mtime=0), "gzip", 413, "exceeds the limit"),
        (packed_request(ONE), "gzip, gzip", 415, "not supported"),
    ],
)
def test_what_cannot_be_unpacked_is_refused(
    live: Live, body: bytes, encoding: str, status: int, reason: str
) -> None:
    answer = httpx.post(live.url + INFER, content=body, headers={"content-encoding": encoding})
    assert answer.status_code == status
    assert reason in answer.json()["error"]
    assert live.service.budget.used == 0

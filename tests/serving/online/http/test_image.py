"""Image files as requests: what predict says of a file, and one line for what is none."""

import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.decode import DecodedImage, decode
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.http import image
from advmoe_deploy.serving.online.limits import Limits
from tests.serving.online.live import (
    INFER,
    ONE,
    Live,
    SlowRunner,
    request_for,
    running,
    wait_for,
    wait_until_ready,
)

PATH = "/v2/models/advmoe/image"
LIMITS = Limits(max_images=4, max_body=1 << 20, memory=8 << 20)  # 524,288 pixels
KINDS = {"PNG": "image/png", "JPEG": "image/jpeg; q=1", "WEBP": "IMAGE/WEBP", "BMP": None}


def encoded(kind: str, width: int = 20, height: int = 30) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module", params=["onnxruntime", "onnxruntime-plan"])
def live(request: pytest.FixtureRequest, tiny_bundle: Bundle) -> Iterator[Live]:
    with (
        open_runner(tiny_bundle, request.param) as runner,
        running(tiny_bundle, runner, LIMITS) as live,
    ):
        wait_until_ready(live.address)
        yield live


def post(
    live: Live, content: bytes, kind: str | None = "image/png", query: str = ""
) -> httpx.Response:
    headers = {} if kind is None else {"Content-Type": kind}
    return httpx.post(live.url + PATH + query, content=content, headers=headers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_answered_as_by_the_bundles_own_decoder(
    live: Live, tiny_bundle: Bundle, kind: str
) -> None:
    content = encoded(kind)
    answer = post(live, content, KINDS[kind])
    assert answer.status_code == 200, answer.text
    told = answer.json()
    decoded = decode(io.BytesIO(content), "x", tiny_bundle.manifest.decoding)
    with open_runner(tiny_bundle) as runner:
        prediction = runner.infer(to_float(decoded.pixels[None]))
    (logits,) = prediction.logits.astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-logits)
    assert told["label_id"] == order[0]
    assert told["label"] == tiny_bundle.manifest.class_names[order[0]]
    assert [each["label_id"] for each in told["top"]] == order[:5].tolist()
    np.testing.assert_allclose(
        [each["probability"] for each in told["top"]], shares[order[:5]], rtol=1e-4
    )
    assert told["logit_margin"] == pytest.approx(logits[order[0]] - logits[order[1]], rel=1e-3)
    (route,) = told["routes"]
    assert route["layer"] == "router"
    assert route["expert_ids"] == prediction.expert_ids["router"][0].tolist()
    assert told["image"] == {"width": 20, "height": 30}
    assert set(told["timing_ms"]) == {"read", "decode", "answer"}
    assert live.service.budget.used == 0


def test_the_margin_of_a_route_is_told_where_scores_are_known(tiny_bundle: Bundle) -> None:
    content = encoded("PNG", 8, 8)
    decoded = decode(io.BytesIO(content), "x", tiny_bundle.manifest.decoding)
    with open_runner(tiny_bundle, "onnxruntime-plan") as runner:
        (scores,) = runner.before_last(to_float(decoded.pixels[None]))["router.scores"]  # type: ignore[attr-defined]
        with running(tiny_bundle, runner, LIMITS) as live:
            wait_until_ready(live.address)
            (route,) = post(live, content).json()["routes"]
    assert route["margin"] == pytest.approx(np.tanh(abs(scores[0] - scores[1]) / 2), rel=1e-4)


@pytest.mark.parametrize(("query", "status"), [("?top=1", 200), ("?top=10", 200), ("?top=11", 400)])
def test_as_many_classes_as_were_asked_for(live: Live, query: str, status: int) -> None:
    answer = post(live, encoded("PNG"), query=query)
    assert answer.status_code == status
    if status == 200:
        assert len(answer.json()["top"]) == int(query[5:])
    else:
        assert answer.json()["error"] == "top is '11'; it must be a number from 1 to 10"
    for bad in ("?top=", "?top=0", "?top=-1", "?top=x", "?top=%F0%9F%98%80", "?top=99999999999"):
        assert post(live, encoded("PNG"), query=bad).status_code == 400
    for unknown in ("?tpo=2", "?top=2&" + "&".join(f"a{n}=" for n in range(20))):
        answer = post(live, encoded("PNG"), query=unknown)
        assert answer.status_code == 400
        assert answer.json()["error"].endswith("is unknown in the address; ?top=N is all it takes")


BAD: dict[str, tuple[bytes, str | None, int, str]] = {
    "nothing": (b"", "image/png", 400, "the body is empty; send the file itself"),
    "text": (b"hello", "image/png", 400, "not a PNG"),
    "cut": (encoded("PNG")[:200], "image/png", 400, "damaged image"),
    "vector": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", 400, "not a PNG"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0", None, 400, "not a PNG"),
    "form": (encoded("PNG"), "multipart/form-data; boundary=x", 415, "curl --data-binary @FILE"),
    "bmp": (encoded("BMP"), "text/plain", 415, "PNG, JPEG, WEBP, BMP, GIF"),
    "json": (b"{}", "application/json", 415, "content-type 'application/json' is no image"),
    "pixels": (encoded("PNG", 800, 700)[:900], "image/png", 413, "560000 pixels; the server takes"),
    "bytes": (b"\0" * ((1 << 20) + 1), "image/png", 413, "exceeds the limit"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_refused_in_one_line(
    live: Live, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    content, kind, status, reason = BAD[name]
    answer = post(live, content, kind)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert reason in error
    assert "\n" not in error
    assert live.service.budget.used == 0
    assert post(live, encoded("PNG")).status_code == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_an_image_file_in_the_place_of_tensors_is_shown_the_way(live: Live, kind: str) -> None:
    answer = httpx.post(live.url + INFER, content=encoded(kind))
    assert answer.status_code == 400
    assert "POST the file to the one that ends in /image" in answer.json()["error"]


def waiting_files(live: Live) -> float:
    text = httpx.get(live.url + "/metrics").text
    found = re.search(r"^advmoe_image_files_waiting (\S+)$", text, re.MULTILINE)
    assert found
    return float(found[1])


def test_images_that_cannot_be_decoded_in_time_are_refused_and_those_of_the_gone_never_begun(
    tiny_bundle: Bundle, slow: SlowRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four images may wait; two decoders are kept busy, and one of those who wait leaves."""
    begun, let_go = [], threading.Event()

    def late(*of: Any) -> DecodedImage:
        begun.append(1)
        assert let_go.wait(timeout=60)
        return decode(*of)

    monkeypatch.setattr(image, "decode", late)
    content = encoded("PNG")
    request = (
        f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode() + content
    limits = Limits(max_images=4, max_body=1 << 20, memory=8 << 20, queue=4)
    with running(tiny_bundle, slow, limits) as live:
        wait_until_ready(live.address)
        waiting = [live.connect() for _ in range(4)]
        for connection in waiting:
            connection.sendall(request)
        wait_for(lambda: waiting_files(live) == 4 and len(begun) == 2)
        refused = post(live, content)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "4 images wait to be decoded" in refused.json()["error"]
        tensors = httpx.post(live.url + INFER, json=request_for(ONE))
        assert tensors.status_code == 200  # which decoders keep from nothing
        waiting.pop().close()
        wait_for(lambda: len(live.server.server_state.connections) == 3)
        let_go.set()
        for connection in waiting:
            assert connection.recv(20).startswith(b"HTTP/1.1 200")
        wait_for(lambda: waiting_files(live) == 0)
        assert len(begun) == 3
        figures = httpx.get(live.url + "/metrics").text
    for status, count in {200: 4, 499: 1, 503: 1}.items():
        assert f'{{model="advmoe",status="{status}",version="1"}} {count}.0' in figures


def test_the_longest_file_of_the_most_pixels_has_room(tiny_bundle: Bundle) -> None:
    limits = Limits(max_images=4, max_body=2 << 20, memory=8 << 20)
    assert limits.max_pixels > 724**2 - 724
    padded = encoded("PNG", 724, 723)
    padded += bytes(limits.max_body - len(padded))
    with open_runner(tiny_bundle) as runner, running(tiny_bundle, runner, limits) as live:
        wait_until_ready(live.address)
        assert post(live, padded).status_code == 200


def test_the_pixels_of_a_file_are_charged_before_they_are_decoded(
    live: Live, tmp_path: Path
) -> None:
    content = encoded("JPEG", 700, 700)  # 3.9 of 8 MB
    assert post(live, content).status_code == 200
    released, held = threading.Event(), threading.Event()

    def hold() -> None:
        with live.service.budget.hold() as share:
            assert share.grow(5 << 20)
            held.set()
            released.wait(timeout=30)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(timeout=30)
    answer = post(live, content)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert post(live, encoded("PNG")).status_code == 200  # there is room for a small one
    released.set()
    other.join()
    assert post(live, content).status_code == 200

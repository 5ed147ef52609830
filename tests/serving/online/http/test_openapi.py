"""The description of the server: every address is in it, and what is answered is as it says."""

import io
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from PIL import Image

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.http.openapi import description
from advmoe_deploy.serving.online.http.rest import build_app
from advmoe_deploy.serving.online.models import Models
from tests.serving.online.live import LIMITS, ONE, Live, request_for, running, wait_until_ready

SPEC = description()


@pytest.fixture(scope="module")
def live(tiny_bundle: Bundle) -> Iterator[Live]:
    with (
        open_runner(tiny_bundle, "onnxruntime-plan") as runner,
        running(tiny_bundle, runner) as live,
    ):
        wait_until_ready(live.address)
        yield live


def require(answer: httpx.Response, path: str) -> None:
    """Check an answer against what is said of ``path``, by its method and status."""
    operation = SPEC["paths"][path][answer.request.method.lower()]
    said = operation["responses"][str(answer.status_code)]
    (kind,) = said["content"]
    assert answer.headers["content-type"] == kind
    schema = {**said["content"][kind]["schema"], "components": SPEC["components"]}
    jsonschema.validate(answer.json(), schema, jsonschema.Draft202012Validator)


def test_every_address_is_described() -> None:
    there = {
        (route.path, method.lower())  # type: ignore[attr-defined]
        for route in build_app(Models(LIMITS), None).routes
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    said = {
        (path, method)
        for path, item in SPEC["paths"].items()
        for method in set(item) - {"parameters"}
    }
    assert there == said


def test_every_schema_is_one_and_is_used() -> None:
    text = str(SPEC["paths"]) + str(SPEC["components"])
    for name, schema in SPEC["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert f"#/components/schemas/{name}'" in text, name


def test_it_is_served(live: Live) -> None:
    assert httpx.get(live.url + "/v2/openapi.json").json() == SPEC


def image() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file, "PNG")
    return file.getvalue()


ASKED: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/v2", {}),
    ("GET", "/v2/health/live", {}),
    ("GET", "/v2/health/ready", {}),
    ("GET", "/v2/models/stats", {}),
    ("POST", "/v2/repository/index", {}),
    ("POST", "/v2/repository/index", {"content": b"["}),
    ("POST", "/v2/repository/models/{name}/load", {}),
    ("POST", "/v2/repository/models/{name}/unload", {}),
    *(
        (method, f"/v2/models/{{name}}{version}{rest}", more)
        for version in ("", "/versions/{version}")
        for method, rest, more in (
            ("GET", "", {}),
            ("GET", "/ready", {}),
            ("GET", "/config", {}),
            ("GET", "/stats", {}),
            ("POST", "/infer", {"json": {**request_for(ONE), "id": "a"}}),
            ("POST", "/infer", {"content": b"{"}),
            ("POST", "/infer", {"content": b"{}", "headers": {"Content-Encoding": "x"}}),
            ("POST", "/image", {"content": image(), "headers": {"Content-Type": "image/png"}}),
            ("POST", "/image", {"content": b"", "headers": {"Content-Type": "text/plain"}}),
        )
    ),
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_answers_are_as_described(live: Live, asked: tuple[str, str, dict[str, Any]]) -> None:
    method, path, more = asked
    address = live.url + path.format(name="advmoe", version="1")
    require(httpx.request(method, address, **more), path)
    if "{name}" in path and not path.endswith("load"):
        require(httpx.request(method, address.replace("advmoe", "cats"), **more), path)

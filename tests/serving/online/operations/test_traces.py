"""Traces: what a collector on the loopback is sent by a server that was asked and then stopped."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from tests.cli.command_line import said
from tests.serving.online.live import INFER, ONE, request_for

SERVE = [sys.executable, "-m", "advmoe_deploy.cli.app", "serve", "--port=0", "--drain=0"]
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


def needs_the_sdk() -> Any:
    return pytest.importorskip(
        "opentelemetry.proto.collector.trace.v1.trace_service_pb2",
        reason="the extra otel is not installed",
    )


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Yield the address of a collector and the bodies that it was sent."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            bodies.append(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", bodies
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def serving(bundle: Bundle, endpoint: str, **variables: str) -> Iterator[tuple[str, str]]:
    """Yield the addresses of a server; that it ends well is seen to."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    told = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **variables}
    with subprocess.Popen(
        [*SERVE, "--grpc-port=0", "--trace", f"advmoe={bundle.path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=clean | told,
    ) as process:
        assert process.stdout is not None
        url, rpc = (process.stdout.readline().split()[1] for _ in range(2))
        yield url.split("/v2")[0], rpc
        process.terminate()
        assert process.wait(timeout=60) == 0


def spans_of(bodies: list[bytes]) -> tuple[str, list[Any]]:
    """Return the name of the service, and all spans."""
    messages = [needs_the_sdk().ExportTraceServiceRequest.FromString(body) for body in bodies]
    (resource, *_) = (each.resource for message in messages for each in message.resource_spans)
    (service,) = (a.value.string_value for a in resource.attributes if a.key == "service.name")
    groups = [each for message in messages for each in message.resource_spans]
    return service, [span for each in groups for part in each.scope_spans for span in part.spans]


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


def test_a_request_is_a_span_with_its_stages(tiny_bundle: Bundle) -> None:
    needs_the_sdk()
    message = service_pb2.ModelInferRequest(model_name="advmoe")
    message.inputs.add(name="images", datatype="FP32", shape=ONE.shape)
    message.raw_input_contents.append(ONE.tobytes())
    two = np.concatenate([ONE, ONE])
    with collector() as (endpoint, bodies):
        with serving(tiny_bundle, endpoint) as (url, rpc):
            given = {**PARENT, "X-Request-Id": "mine"}
            assert httpx.post(url + INFER, json=request_for(two), headers=given).status_code == 200
            assert httpx.post(url + INFER, content=b"{").status_code == 400
            assert httpx.get(url + "/v2/health/live").status_code == 200
            with grpc.insecure_channel(rpc) as channel:
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                stub.ModelInfer(message, metadata=tuple(PARENT.items()))
        service, spans = spans_of(bodies)
    assert service == "advmoe"
    first, second, third = (span for span in spans if span.name == "infer")
    assert first.trace_id.hex() == third.trace_id.hex() == TRACE
    assert first.parent_span_id.hex() == "b7ad6b7169203331"
    assert (second.trace_id.hex() != TRACE, second.parent_span_id) == (True, b"")
    assert first.kind == first.SPAN_KIND_SERVER
    assert attributes(first) == {
        "network.protocol.name": "http",
        "http.response.status_code": 200,
        "url.path": INFER,
        "advmoe.request_id": "mine",
        "advmoe.images": 2,
        "advmoe.model": "advmoe",
        "advmoe.version": "1",
        "advmoe.engine": "onnxruntime",
    }
    assert attributes(second)["http.response.status_code"] == 400
    assert attributes(third)["rpc.method"] == "ModelInfer"
    for span in (first, third):
        parts = [each for each in spans if each.parent_span_id == span.span_id]
        assert [each.name for each in parts] == ["read", "wait", "compute", "write"]
        assert all(each.trace_id == span.trace_id for each in parts)
        assert span.start_time_unix_nano <= parts[0].start_time_unix_nano
        assert parts[-1].end_time_unix_nano <= span.end_time_unix_nano


def test_a_collector_that_is_away_does_not_hold_the_server(tiny_bundle: Bundle) -> None:
    needs_the_sdk()
    with serving(tiny_bundle, "http://127.0.0.1:9", OTEL_SERVICE_NAME="cats") as (url, _):
        assert httpx.post(url + INFER, json=request_for(ONE)).status_code == 200


def test_variables_name_the_service_and_sample(tiny_bundle: Bundle) -> None:
    needs_the_sdk()
    named = {"OTEL_SERVICE_NAME": "cats", "OTEL_TRACES_SAMPLER": "parentbased_always_off"}
    with collector() as (endpoint, bodies):
        with serving(tiny_bundle, endpoint, **named) as (url, _):
            for headers in ({}, PARENT):
                answer = httpx.post(url + INFER, json=request_for(ONE), headers=headers)
                assert answer.status_code == 200
        service, spans = spans_of(bodies)
    assert service == "cats"
    assert {span.trace_id.hex() for span in spans} == {TRACE}


def test_a_variable_that_makes_no_sense_is_one_line(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_the_sdk()
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "1")  # and batches of 512
    assert run(["serve", str(tiny_bundle.path), "--trace", "--port=0"]) == 2
    line = said(capsys)
    assert "max_queue_size" in line
    assert "environment variables" in line


def test_without_the_extra_it_is_named(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, module, None)
    assert run(["serve", str(tiny_bundle.path), "--trace", "--port=0"]) == 4
    assert "pip install 'advmoe-deploy[otel]'" in capsys.readouterr().err

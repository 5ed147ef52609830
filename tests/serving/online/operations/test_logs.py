"""The log: what a client sends begins no line of it, and each line of JSON is an object."""

import json
import logging
import re
import signal
import socket
import subprocess
import sys
from datetime import datetime
from typing import Any

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.serving.online.operations.logs import JsonLines, Text, logging_to_stderr
from tests.serving.online.live import INFER, ONE, request_for

SERVE = [sys.executable, "-m", "advmoe_deploy.cli.app", "serve", "--port=0", "--drain=0"]
FORGED = "a\nERROR forged\r\x1b[2J\x85\u2028\u202e\x7f\ud800"
OWN_PATH = b"/v2/models/a%0aERROR%1b[2J/ready?secret=1"


def failed(message: str) -> logging.LogRecord:
    try:
        raise ValueError(message)
    except ValueError:
        return logging.makeLogRecord({"msg": "%s", "args": (message,), "exc_info": sys.exc_info()})


def test_text_has_a_line_for_each_message_whatever_it_quotes() -> None:
    first, *rest = Text().format(failed(FORGED)).split("\n")
    assert first == r"a\nERROR forged\r\x1b[2J\x85\u2028\u202e\x7f\ud800"
    assert all(line.startswith("  ") for line in rest)
    assert all(line.isprintable() and line.isascii() for line in rest)
    assert "  ERROR forged" in "\n".join(rest)


def test_json_is_one_line_whatever_it_quotes() -> None:
    text = JsonLines().format(failed(FORGED))
    assert text.isprintable()
    assert text.isascii()
    told = json.loads(text)
    assert told["message"] == FORGED.replace("\ud800", r"\ud800").rstrip()
    assert "ValueError: a\nERROR forged" in told["exception"]
    json.dumps(told).encode()  # which lone surrogates would not survive


def test_nothing_stays_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    log, before = logging.getLogger("advmoe_deploy.serve"), list(logging.getLogger().handlers)
    with logging_to_stderr(lambda _: None, as_json=True) as tell:
        tell("100 % ready")
        log.warning("a\nb")
    assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == [
        "100 % ready",
        "a\nb",
    ]
    assert logging.getLogger().handlers == before
    assert log.level == logging.NOTSET


def asked(bundle: Bundle, *options: str) -> tuple[list[str], str]:
    """Return the lines of stderr, and stdout, of a server that was asked and then stopped."""
    with subprocess.Popen(
        [*SERVE, "--grpc-port=0", *options, f"advmoe={bundle.path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stderr.readline()
        ready = re.search(r"at http://(\S+):(\d+) and by gRPC at ([^\s;]+);", first)
        assert ready is not None, first
        host, port, rpc = ready[1], int(ready[2]), ready[3]
        ask(host, port, rpc)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0
    return (first + err).splitlines(), out


def ask(host: str, port: int, rpc: str) -> None:
    url, given = f"http://{host}:{port}", {"X-Request-Id": "mine"}
    assert httpx.post(url + INFER, json=request_for(ONE), headers=given).status_code == 200
    assert httpx.post(url + INFER, content=b"{", headers=given).status_code == 400
    with socket.create_connection((host, port)) as connection:
        lines = (b"GET %b HTTP/1.1" % OWN_PATH, b"Host: localhost", b"X-Request-Id: a\tb")
        connection.sendall(b"\r\n".join([*lines, b"Connection: close", b"", b""]))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 404")
    with grpc.insecure_channel(rpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(
                service_pb2.ModelInferRequest(model_name="a\nb"),
                metadata=(("x-request-id", "mine"),),
            )


def test_a_server_logs_objects(tiny_bundle: Bundle) -> None:
    lines, out = asked(tiny_bundle, "--log-format=json", "--access-log")
    first, *told = (json.loads(line) for line in lines)
    assert first["message"].startswith("serving 'advmoe' at http://127.0.0.1:")
    assert (first["level"], first["logger"]) == ("INFO", "advmoe_deploy.serve")
    assert out.startswith("POST http://127.0.0.1:")
    assert all(line["logger"] == "advmoe_deploy.access" for line in told)
    assert datetime.fromisoformat(told[0]["time"].replace("Z", "+00:00")).tzinfo is not None

    def known(line: dict[str, Any]) -> dict[str, Any]:
        return {key: line[key] for key in line if key not in {"time", "level", "logger", "ms"}}

    model = {"model": "advmoe", "version": "1"}
    http = {"request_id": "mine", "protocol": "http", "method": "POST", "path": INFER}
    assert [known(line) for line in (told[0], told[1], told[3])] == [
        {"message": f"POST {INFER} 200", **http, **model, "status": 200, "images": 1},
        {"message": f"POST {INFER} 400", **http, **model, "status": 400, "images": 0},
        {
            "message": "ModelInfer 404",
            "request_id": "mine",
            "protocol": "grpc",
            "rpc": "ModelInfer",
            "status": 404,
            "images": 0,
        },
    ]
    assert told[2]["path"] == "/v2/models/a%0aERROR%1b[2J/ready"
    assert re.fullmatch("[0-9a-f]{32}", told[2]["request_id"])
    assert "images" not in told[2]
    assert all(line["ms"] > 0 for line in told)


def test_a_server_logs_text(tiny_bundle: Bundle) -> None:
    lines, _ = asked(tiny_bundle, "--access-log")
    assert lines[0].startswith("serving 'advmoe' at http://127.0.0.1:")
    assert "; computed by onnxruntime fp32; " in lines[0]
    assert re.fullmatch(
        rf"POST {INFER} 200 request_id=mine protocol=http model=advmoe version=1 ms=[\d.]+ "
        "images=1",
        lines[1],
    )
    assert lines[3].startswith("GET /v2/models/a%0aERROR%1b[2J/ready 404 request_id=")
    assert len(lines) == 5


def test_without_the_access_log_there_is_one_line(tiny_bundle: Bundle) -> None:
    lines, _ = asked(tiny_bundle)
    assert len(lines) == 1


def test_an_error_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "no-such-bundle", "--log-format", "json"]) == 3
    told = json.loads(capsys.readouterr().err)
    assert told["level"] == "ERROR"
    assert "no-such-bundle" in told["message"]
    assert run(["serve", "no-such-bundle"]) == 3
    assert capsys.readouterr().err.startswith("advmoe: error: ")

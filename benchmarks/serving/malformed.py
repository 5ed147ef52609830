"""Requests that are malformed at random, and those that are costly by design: 4xx, and no more."""

import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from advmoe_deploy.bundle import Bundle
from benchmarks.serving.client import HOST, memory_of, probed
from benchmarks.serving.server import Running
from benchmarks.serving.speed import images_of

MIB = 1 << 20
JUNK = [None, True, -1, 1.5, 10**30, "", "\ud800", "x\n" * 99, [], [[]], {}, {"a": [1]}, [None]]


def malformed(running: Running, bundle: Bundle, count: int) -> dict[str, Any]:
    """Return what ``count`` random requests and the costly ones were answered."""
    random.seed(0)
    images, pid, port = images_of(bundle, 1), running.process.pid, running.port
    with probed(port, pid) as seen:
        answers = Counter(
            status_of(port, random_request(running.model, images)) for _ in range(count)
        )
    result: dict[str, Any] = {"random": {"answers": _named(answers), **seen}}
    with probed(port, pid) as seen:
        for _ in range(count // 4):
            hurried(port, [random_request(running.model, images) for _ in range(4)])
    result["hurried"] = seen
    for name, request in costly(running.model, images).items():
        before, began = memory_of(pid), time.perf_counter()
        with probed(port, pid) as seen:
            status = status_of(port, request)
        result[name] = {
            "mib": round(len(request) / MIB, 2),
            "status": status,
            "seconds": round(time.perf_counter() - began, 3),
            **seen,
            "more_memory_mib": round(seen["memory_mib"] - before / 1024, 1),
        }
    result["traceback"] = "Traceback" in running.said
    return result


def costly(model: str, images: np.ndarray) -> dict[str, bytes]:
    """Return requests that cost a careless server seconds or gigabytes each."""
    tensor = {"name": "images", "datatype": "FP32", "shape": list(images.shape), "data": [0.5]}
    chunked, wordy = _head(model, "Transfer-Encoding: chunked"), b"a" * (16 * MIB)
    long = "x" * (16 * MIB)

    def of(**changes: Any) -> bytes:
        return _post(model, json.dumps({"inputs": [{**tensor, **changes}]}).encode())

    return {
        "shape of words": of(shape=["a"] * (3 * MIB)),
        "data of empty lists": of(data=[[]] * (4 * MIB)),
        "parameters": of(parameters={str(i): [] for i in range(MIB)}),
        "long name": of(name=long),
        "long datatype": of(datatype=long),
        "deep": _post(model, b"[" * (16 * MIB)),
        "deep data": _post(model, b'{"inputs":[{"data":' + b"[" * (16 * MIB)),
        "endless number": _post(model, b'{"inputs":[{"data":[0.' + b"5" * (16 * MIB) + b"]}]}"),
        "chunks of one byte": chunked + b"1\r\n \r\n" * 200_000 + b"0\r\n\r\n",
        "endless trailer": chunked + b"0\r\na: " + wordy,
        "trailers": chunked + b"0\r\n" + b"a: b\r\n" * MIB + b"\r\n",
        "endless line of a chunk": chunked + b"1;" + wordy,
        "long path": b"GET /" + wordy + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "long header": _head(model, "a: " + long),
        "60 MiB of spaces": _post(model, b" " * (60 * MIB)),
    }


def _head(model: str, *lines: str) -> bytes:
    first = f"POST /v2/models/{model}/infer HTTP/1.1"
    return "\r\n".join([first, "Host: localhost", *lines, "", ""]).encode()


def _post(model: str, body: bytes) -> bytes:
    return _head(model, f"Content-Length: {len(body)}") + body


def random_request(model: str, images: np.ndarray) -> bytes:
    """Return a request with junk in its JSON, its body or its head."""
    kind = random.randrange(3)
    message = {
        "id": "7",
        "parameters": {"binary_data_output": True, "timeout": 10_000_000},
        "inputs": [
            {
                "name": "images",
                "datatype": "FP32",
                "shape": list(images.shape),
                "data": images.ravel().round(2).tolist(),
            }
        ],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }
    if kind == 0:
        return _post(model, json.dumps(_changed(message)).encode())
    request = bytearray(_post(model, json.dumps(message).encode()))
    if kind == 1:  # bytes of the body
        for _ in range(random.randint(1, 4)):
            at = random.randrange(request.index(b"\r\n\r\n") + 4, len(request))
            request[at] = random.randrange(256)
        return bytes(request)
    for _ in range(random.randint(1, 3)):  # bytes of the head, lengths among them
        request[random.randrange(request.index(b"\r\n\r\n"))] = random.randrange(256)
    return bytes(request)


def _changed(message: Any) -> Any:
    """Return ``message`` with junk in a random place."""
    place = message
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = random.choice(keys)
        if random.random() < 0.4 or not isinstance(place[key], dict | list) or not place[key]:
            place[key] = random.choice(JUNK)
            return message
        place = place[key]


def hurried(port: int, requests: Sequence[bytes]) -> None:
    """Send ``requests`` ahead of their answers, the last one perhaps in part, and leave.

    At random the client reads some of the answers before, and resets the connection or closes it.
    """
    with socket.create_connection((HOST, port), timeout=60) as connection:
        if random.random() < 0.5:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        sent = b"".join(requests)
        with suppress(OSError):
            connection.sendall(sent[: random.randint(len(sent) // 2, len(sent))])
            if random.random() < 0.5:
                connection.recv(random.choice([1, 4096]))


def status_of(port: int, request: bytes) -> int:
    """Return the status of the answer; 0 where none came although the request had ended."""
    with socket.create_connection((HOST, port), timeout=60) as connection:
        with suppress(OSError):
            connection.sendall(request)
        with suppress(OSError):
            answer = connection.recv(4096)
            return int(answer.split(None, 2)[1]) if answer else 0
    return 0


def _named(answers: Counter[int]) -> dict[str, int]:
    return {str(status): count for status, count in sorted(answers.items())}

"""Requests that are malformed at random, and those that are costly by design: 4xx, and no more."""

import gzip
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from advmoe_deploy.bundle import Bundle
from benchmarks.serving.client import HOST, memory_of, probed
from benchmarks.serving.server import Running
from benchmarks.serving.speed import images_of

MIB = 1 << 20
AGAIN = 5  # how often each costly request is sent, one after the other
# Memory that comes and goes whatever is asked: of the allocator, and of threads that begin.
NOISE_MIB = 8.0
HALVES, HALF_HEADS = 20, 200
JUNK: list[Any] = [
    None,
    True,
    -1,
    1.5,
    10**30,
    "",
    "\ud800",
    "x\n" * 99,
    [],
    [[]],
    {},
    {"a": [1]},
    [None],
]


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
    for name, (request, length) in costly(running.model, images).items():
        result[name] = held(port, pid, length, partial(status_of, port, request))
        result[name]["holds"]["refused"] = 400 <= result[name]["status"] < 500
    result["half bodies"] = held(port, pid, *half_bodies(running.model, port), again=1)
    result["half heads"] = held(port, pid, *half_heads(port), again=1)
    result["traceback"] = "Traceback" in running.said
    return result


def held(
    port: int, pid: int, length: int, ask: Callable[[], Any], again: int = AGAIN
) -> dict[str, Any]:
    """Return what came of a request of so many bytes, unpacked, and what must hold meanwhile.

    Health is asked all the time beside it.
    """
    before, began = memory_of(pid), time.perf_counter()
    with probed(port, pid, pause_s=0.001) as seen:
        found = [ask() for _ in range(again)]
    mib, more = length / MIB, seen["memory_mib"] - before / 1024
    return {
        "mib": round(mib, 2),
        "n": again,
        "status": found[0] if len(set(map(str, found))) == 1 else found,
        "seconds": round((time.perf_counter() - began) / again, 3),
        **seen,
        "more_memory_mib": round(more, 1),
        "holds": {
            f"memory <= 4 x body + {NOISE_MIB:g} MiB": more <= 4 * mib + NOISE_MIB,
            "health under 50 ms": seen["health_max_ms"] < 50,
        },
    }


class Costly(NamedTuple):
    """A request, and the bytes that its body unpacks to, its head included."""

    request: bytes
    length: int


def costly(model: str, images: np.ndarray) -> dict[str, Costly]:
    """Return requests that cost a careless server seconds or gigabytes each."""
    plain = {name: Costly(each, len(each)) for name, each in _plain(model, images).items()}
    return plain | {
        "gzip of 64 MiB of spaces": _packed(model, b" " * (64 * MIB)),
        "gzip beyond the limit": _packed(model, bytes(256 * MIB)),
    }


def _packed(model: str, body: bytes) -> Costly:
    """Return a request whose body is packed: it is one of the unpacked length for what it costs."""
    small = gzip.compress(body, 1, mtime=0)
    head = _head(model, "Content-Encoding: gzip", f"Content-Length: {len(small)}")
    return Costly(head + small, min(len(body), 64 * MIB))


def half_bodies(model: str, port: int) -> tuple[int, Callable[[], dict[str, int]]]:
    """Return the bytes of halves of long bodies, and what sends them and waits for the rest.

    Returned are counts of the answers that came all the same, 0 for those that are waited for.
    """
    half = 30 * MIB
    head = _head(model, f"Content-Length: {2 * half}", "Inference-Header-Content-Length: 9")

    return HALVES * half, lambda: _left_open(port, [head + bytes(half)] * HALVES)


def half_heads(port: int) -> tuple[int, Callable[[], dict[str, int]]]:
    """Return the bytes of beginnings of requests, and what sends them and waits."""
    begin = b"POST /v2/models"
    return HALF_HEADS * len(begin), lambda: _left_open(port, [begin] * HALF_HEADS)


def _left_open(port: int, requests: Sequence[bytes]) -> dict[str, int]:
    answers: Counter[int] = Counter()
    with ExitStack() as stack:
        opened = []
        for request in requests:
            opened.append(stack.enter_context(socket.create_connection((HOST, port), timeout=5)))
            with suppress(OSError):
                opened[-1].sendall(request)
        time.sleep(1.0)
        for connection in opened:
            connection.settimeout(0)
            try:
                answer = connection.recv(4096)
            except BlockingIOError:
                answer = b""
            except OSError:
                answer = b"HTTP/1.1 -1"  # it was reset
            answers[int(answer.split(None, 2)[1]) if answer else 0] += 1
    return _named(answers)


def _plain(model: str, images: np.ndarray) -> dict[str, bytes]:
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

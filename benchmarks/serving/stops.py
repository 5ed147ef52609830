"""SIGTERM at random moments, start included: exit code 0, and every accepted request answered.

Before the port of HTTP is closed the server is not ready.
"""

import asyncio
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc

from advmoe_deploy.bundle import Bundle
from benchmarks.serving.client import HOST, Client, binary_request
from benchmarks.serving.rpc import INFER, OPTIONS, message
from benchmarks.serving.server import await_ready, on_cores, ready, start
from benchmarks.serving.speed import images_of

CLIENTS, CALLERS = 8, 2  # over HTTP, and over gRPC


def stops(bundle_path: Path, bundle: Bundle, rounds: int, cores: set[int]) -> dict[str, Any]:
    """Return how so many servers ended that were stopped at random moments."""
    random.seed(0)
    model, images = bundle.manifest.model.family, images_of(bundle, 1)
    request, call = binary_request(model, images), message(model, images).SerializeToString()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        began = time.perf_counter()
        with on_cores(cores):
            process = start(bundle_path, ["--grpc-port=0"], log)
        await_ready(process, log)
        ready_s = time.perf_counter() - began
        _end(process)
        ends = [
            asyncio.run(_stopped(bundle_path, log, request, call, after_s, cores))
            for after_s in [random.uniform(0, 2 * ready_s) for _ in range(rounds)]
        ]
    served = [end for end in ends if end["served"]]
    answers = sum((end["answers"] for end in ends), Counter[str]())
    known = {"200", "503", "gRPC OK", "gRPC UNAVAILABLE"}
    return {
        "rounds": rounds,
        "seconds_to_ready": round(ready_s, 2),
        "while_starting": rounds - len(served),
        "exit_codes": dict(Counter(str(end["code"]) for end in ends)),
        "not_0": [{key: end[key] for key in ("code", "after_s")} for end in ends if end["code"]],
        "answers": dict(answers),
        "tracebacks": sum(end["traceback"] for end in ends),
        "holds": {
            "exit code 0": all(end["code"] == 0 for end in ends),
            "every request answered": answers.keys() <= known,
            "not ready before the port closes": all(end["not_ready_first"] for end in served),
        },
    }


async def _stopped(
    bundle: Path, log: Path, request: bytes, message: bytes, after_s: float, cores: set[int]
) -> dict[str, Any]:
    with on_cores(cores):
        process = start(bundle, ["--drain=0.5", "--grpc-port=0"], log)
    at = time.perf_counter() + after_s
    answers: Counter[str] = Counter()
    asking: list[asyncio.Task[None]] = []
    ports: tuple[int, int] | None = None
    while time.perf_counter() < at:
        if ports is None and (ports := _found(log)):
            http = [_ask(ports[0], request, answers) for _ in range(CLIENTS)]
            rpc = [_call(ports[1], message, answers) for _ in range(CALLERS)]
            asking = [asyncio.create_task(each) for each in (*http, *rpc)]
        await asyncio.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    readiness = [] if ports is None else await _readiness(ports[0])
    while process.poll() is None:
        await asyncio.sleep(0.01)
    await asyncio.gather(*asking)
    said = log.read_text()
    return {
        "after_s": round(after_s, 3),
        "answers": answers,
        "served": bool(asking),
        "not_ready_first": 503 in readiness and 200 not in readiness[readiness.index(503) :],
        "code": process.returncode,
        "traceback": "Traceback" in said,
    }


async def _readiness(port: int) -> list[int]:
    """Return what ``/v2/health/ready`` says on new connections until none is taken any more."""
    asked, found = b"GET /v2/health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n", list[int]()
    while True:
        client = Client(port)
        try:
            await client.connect()
        except OSError:
            return found
        found.append((await client.ask(asked))[0])
        client.close()
        await asyncio.sleep(0.01)


async def _ask(port: int, request: bytes, answers: Counter[str]) -> None:
    """Ask until the server takes no connection; a connection that it took owes an answer."""
    client = Client(port)
    while True:
        if not client.connected:
            try:
                await client.connect()
            except OSError:
                return
        status, _ = await client.ask(request)
        answers[str(status) if status else client.failure] += 1
        if status == 0:
            return


async def _call(port: int, message: bytes, answers: Counter[str]) -> None:
    """Call over gRPC until the server refuses, which it says as UNAVAILABLE."""
    async with grpc.aio.insecure_channel(f"{HOST}:{port}", OPTIONS) as channel:
        ask = channel.unary_unary(INFER)
        while True:
            try:
                await ask(message)
            except grpc.RpcError as error:
                answers[f"gRPC {error.code().name}"] += 1
                return
            answers["gRPC OK"] += 1


def _found(log: Path) -> tuple[int, int] | None:
    """Return the ports of HTTP and gRPC, once the server has said that it is ready."""
    found = ready(log)
    return (int(found[2]), int(found[3])) if found else None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(timeout=60)

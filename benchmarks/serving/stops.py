"""SIGTERM at random moments, start included: exit code 0, and every accepted request answered."""

import asyncio
import random
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from advmoe_deploy.bundle import Bundle
from benchmarks.serving.client import HOST, Client, binary_request
from benchmarks.serving.server import on_cores, start
from benchmarks.serving.speed import images_of

CLIENTS = 8


def stops(bundle_path: Path, bundle: Bundle, rounds: int, cores: set[int]) -> dict[str, Any]:
    """Return how so many servers ended that were stopped at random moments."""
    random.seed(0)
    request = binary_request(bundle.manifest.model.family, images_of(bundle, 1))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        began = time.perf_counter()
        with on_cores(cores):
            process = start(bundle_path, [], log)
        _port_of(process, log)
        ready_s = time.perf_counter() - began
        _end(process)
        ends = [
            asyncio.run(_stopped(bundle_path, log, request, random.uniform(0, 2 * ready_s), cores))
            for _ in range(rounds)
        ]
    return {
        "rounds": rounds,
        "seconds_to_ready": round(ready_s, 2),
        "while_starting": sum(not end["served"] for end in ends),
        "exit_codes": dict(Counter(str(end["code"]) for end in ends)),
        "not_0": [{key: end[key] for key in ("code", "after_s")} for end in ends if end["code"]],
        "answers": dict(sum((end["answers"] for end in ends), Counter())),
        "tracebacks": sum(end["traceback"] for end in ends),
    }


async def _stopped(
    bundle: Path, log: Path, request: bytes, after_s: float, cores: set[int]
) -> dict[str, Any]:
    with on_cores(cores):
        process = start(bundle, ["--drain=0.5"], log)
    at = time.perf_counter() + after_s
    answers: Counter[str] = Counter()
    asking: list[asyncio.Task[None]] = []
    while time.perf_counter() < at:
        if not asking and (port := _found(log)):
            asking = [asyncio.create_task(_ask(port, request, answers)) for _ in range(CLIENTS)]
        await asyncio.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    while process.poll() is None:
        await asyncio.sleep(0.01)
    await asyncio.gather(*asking)
    said = log.read_text()
    return {
        "after_s": round(after_s, 3),
        "answers": answers,
        "served": bool(asking),
        "code": process.returncode,
        "traceback": "Traceback" in said,
    }


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


def _found(log: Path) -> int | None:
    found = re.search(rf"http://{HOST}:(\d+)", log.read_text())
    return int(found[1]) if found else None


def _port_of(process: subprocess.Popen[bytes], log: Path) -> int:
    while (port := _found(log)) is None:
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
        time.sleep(0.01)
    return port


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(timeout=60)

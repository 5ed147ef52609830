"""A bundle that is replaced all the time while it is asked: no failure, no answer of both."""

import asyncio
import json
import signal
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.select import open_runner
from benchmarks.serving.client import Client, binary_request, memory_of, probed
from benchmarks.serving.server import Running, serving
from benchmarks.serving.speed import images_of

CLIENTS = 8
IMAGES = 4  # of a request, each of which has to be of one and the same bundle


def reloads(
    bundles: tuple[Bundle, Bundle], engine: str, requests: int, cores: set[int], *options: str
) -> dict[str, Any]:
    """Return what came of ``requests`` while the one bundle took the place of the other."""
    images = images_of(bundles[0], IMAGES)
    known = [_logits(bundle, engine, images) for bundle in bundles]
    if min(np.abs(known[0] - known[1]).max(axis=1)) < 1e-2:
        raise RuntimeError("the bundles answer alike; take another --other")
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "bundle"
        link.symlink_to(bundles[0].path.absolute())
        with serving(link, *options, cores=cores) as running:
            request = binary_request(running.model, images)
            before = memory_of(running.process.pid)
            with probed(running.port, running.process.pid) as health:
                found = asyncio.run(_asked(running, link, bundles, request, known, requests))
            said = running.said
            after = memory_of(running.process.pid)
    return {
        **found,
        "reloads": said.count(" again: version "),
        "not_loaded": (not_loaded := said.count("was not loaded")),
        "memory_before_mib": round(before / 1024, 1),
        "memory_after_mib": round(after / 1024, 1),
        **health,
        "holds": {
            "all answered with 200": found["answers"].keys() == {"200"},
            "no answer of both bundles": "mixed" not in found["answered_by"],
            "each was loaded": not_loaded == 0,
        },
    }


async def _asked(
    running: Running,
    link: Path,
    bundles: tuple[Bundle, Bundle],
    request: bytes,
    known: list[np.ndarray],
    requests: int,
) -> dict[str, Any]:
    left, seen, statuses = requests, Counter[str](), Counter[str]()

    async def ask() -> None:
        nonlocal left
        client = Client(running.port)
        while left > 0:
            left -= 1
            status, body = await client.ask(request)
            statuses[str(status)] += 1
            seen[_whose(body, known) if status == 200 else "none"] += 1
        client.close()

    async def swap() -> None:
        turn = 0
        while left > 0 and running.process.poll() is None:
            turn, done = turn + 1, running.said.count("loaded")
            fresh = link.with_suffix(".new")
            fresh.symlink_to(bundles[turn % 2].path.absolute())
            fresh.replace(link)
            running.process.send_signal(signal.SIGHUP)
            while running.said.count("loaded") == done and running.process.poll() is None:
                await asyncio.sleep(0.01)

    await asyncio.gather(swap(), *(ask() for _ in range(CLIENTS)))
    return {"clients": CLIENTS, "answers": dict(statuses), "answered_by": dict(seen)}


def _logits(bundle: Bundle, engine: str, images: np.ndarray) -> np.ndarray:
    with open_runner(bundle, engine) as runner:
        return runner.infer(images).logits


def _whose(body: bytes, known: list[np.ndarray]) -> str:
    """Return whose logits a binary answer holds, all of them: "0", "1", or "mixed"."""
    end = json.JSONDecoder().raw_decode(body.decode("latin-1"))[1]
    logits = np.frombuffer(body[end : end + known[0].nbytes], "<f4").reshape(known[0].shape)
    near = [bool(np.allclose(logits, each, atol=1e-3)) for each in known]
    return str(near.index(True)) if any(near) else "mixed"

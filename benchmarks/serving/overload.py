"""More than the server can do: who is answered what, in which memory, and how soon it is free."""

import asyncio
import time
from typing import Any

from advmoe_deploy.bundle import Bundle
from benchmarks.serving.client import (
    Client,
    Sample,
    binary_request,
    closed_loop,
    memory_of,
    open_loop,
    probed,
    randomly,
)
from benchmarks.serving.server import Running
from benchmarks.serving.speed import images_of

MANY_CLIENTS = 1500
LARGE = 1024


def overload(running: Running, bundle: Bundle, seconds: float) -> dict[str, Any]:
    """Return a row for each kind of overload, and what must hold of all."""
    port, pid = running.port, running.process.pid
    one = binary_request(running.model, images_of(bundle, 1))
    large = binary_request(running.model, images_of(bundle, LARGE))
    capacity = closed_loop(port, one, 32, min(10.0, seconds)).summary()["per_s"]
    rows = {"idle_memory_mib": round(memory_of(pid) / 1024, 1), "capacity_per_s": capacity}
    kinds = {
        "4x": lambda: open_loop(port, one, randomly(4 * capacity, seconds)),
        "1500 clients": lambda: closed_loop(port, one, MANY_CLIENTS, seconds),
        "32 x 1024 images": lambda: closed_loop(port, large, 32, seconds),
    }
    for name, ask in kinds.items():
        with probed(port, pid) as seen:
            sample: Sample = ask()
        after_s = time_of_one(port, one)
        rows[name] = {**sample.summary(), **seen, "next_request_ms": round(1e3 * after_s, 3)}
        rows[name]["holds"] = {
            "answered with 200 or 503": set(sample.answers) <= {200, 503},
            "health under 50 ms": seen["health_max_ms"] < 50,
        }
    rows["4x"]["holds"]["all were asked"] = "not_asked" not in rows["4x"]
    for name in ("4x", "1500 clients"):
        kept = rows[name]["per_s"] >= 0.9 * capacity
        rows[name]["holds"]["capacity kept"] = kept
    rows["clients that leave"] = leaving(port, large, one)
    return rows


def time_of_one(port: int, request: bytes) -> float:
    """Return the time until a request is answered, sent again where it is refused."""

    async def ask() -> float:
        client, began = Client(port), time.perf_counter()
        while (await client.ask(request))[0] != 200:
            await asyncio.sleep(0.001)
        client.close()
        return time.perf_counter() - began

    return asyncio.run(ask())


def leaving(port: int, large: bytes, one: bytes) -> dict[str, float]:
    """Return how long a request takes after 32 clients have asked and left, and one on its own."""
    alone_s = min(time_of_one(port, one) for _ in range(5))

    async def ask_and_leave() -> None:
        asking = [asyncio.create_task(Client(port).ask(large)) for _ in range(32)]
        await asyncio.wait(asking, timeout=1.0)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    asyncio.run(ask_and_leave())
    return {"alone_ms": 1e3 * alone_s, "after_they_left_ms": 1e3 * time_of_one(port, one)}

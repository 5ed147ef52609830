"""A batcher over work whose answers are known: it doubles pixels, and can be held."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.runtime.pathways import Rows
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.serving.online.batcher import Batcher
from advmoe_deploy.serving.online.limits import Limits

SMALL = Limits(max_images=50, batch=8, queue=100, delay_s=0.0)


class Doubling:
    """Doubles each image's one pixel; the pathway is the pixel modulo the number of pathways."""

    def __init__(self, pathways: int = 1) -> None:
        self.pathways = pathways
        self.open = threading.Event()
        self.open.set()
        self.begun = threading.Event()
        self.routed: list[list[int]] = []
        self.ran: list[tuple[int, list[int]]] = []

    def route(self, images: NDArray[np.float32]) -> tuple[NDArray[np.int64], Rows]:
        pixels = images.reshape(-1).astype(np.int64)
        self.routed.append(pixels.tolist())
        return pixels % self.pathways, Rows({"x": images})

    def count(self, rows: int) -> int:
        return rows

    def run(self, pathway: int, rows: Rows) -> Prediction:
        pixels = rows.tensors["x"].reshape(-1).astype(np.int64)
        self.ran.append((pathway, pixels.tolist()))
        self.begun.set()
        assert self.open.wait(timeout=30)
        if (pixels == 13).any():
            raise ValueError("thirteen")
        ids = np.full((len(pixels), 1), pathway)
        return Prediction(2 * rows.tensors["x"].reshape(-1, 1), {"r": ids}, {"r": ids * 1.0})


def image(*pixels: int) -> NDArray[np.float32]:
    return np.array(pixels, np.float32).reshape(-1, 1, 1, 1)


def alive() -> bool:
    return False


@contextmanager
def batching(
    work: Doubling, limits: Limits = SMALL, expecting: Callable[[], bool] = lambda: False
) -> Iterator[Batcher]:
    batcher = Batcher(work, limits, expecting=expecting)
    batcher.start()
    try:
        yield batcher
    finally:
        work.open.set()
        batcher.close()


def within(work: Doubling, test: Callable[[Batcher], Awaitable[None]], **options: object) -> None:
    """Run ``test`` with a batcher over ``work``."""

    async def run() -> None:
        with batching(work, **options) as batcher:  # type: ignore[arg-type]
            await test(batcher)

    asyncio.run(asyncio.wait_for(run(), timeout=60))


async def held(batcher: Batcher, work: Doubling) -> "asyncio.Future[Prediction]":
    """Return the job that keeps the thread busy until ``work.open`` is set."""
    work.open.clear()
    first = batcher.submit(image(0), 30, alive)
    while not work.begun.is_set():
        await asyncio.sleep(0.001)
    return first

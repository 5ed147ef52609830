"""Decoders of image files: what cannot begin in time is refused, what nobody wants not begun."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable

import pytest

from advmoe_deploy.serving.online.protocol import RefusedError
from advmoe_deploy.serving.online.workers import THREADS, Workers


class Work:
    """Ends when it is let go; counts how often it was begun."""

    def __init__(self) -> None:
        self.let_go, self.begun = threading.Event(), 0

    def __call__(self) -> int:
        self.begun += 1
        assert self.let_go.wait(timeout=60)
        return self.begun


def within(test: Callable[[Workers, Work, list["asyncio.Task[int]"]], Awaitable[None]]) -> Work:
    """Run ``test`` with workers, at most six images at once, all of whose threads are busy."""
    work = Work()

    async def run() -> None:
        workers = Workers(6)
        tasks = [asyncio.create_task(ask(workers, work)) for _ in range(THREADS)]
        while work.begun < THREADS:
            await asyncio.sleep(0.001)
        try:
            await test(workers, work, tasks)
        finally:
            work.let_go.set()
            await asyncio.gather(*tasks)
            workers.close()

    asyncio.run(run())
    return work


async def ask(
    workers: Workers, work: Work, timeout_s: float = 60.0, is_gone: Callable[[], bool] = bool
) -> int:
    return await workers.run(work, timeout_s, is_gone)


def test_too_many_are_refused_at_once_and_told_when_to_come_back() -> None:
    async def test(workers: Workers, work: Work, tasks: list["asyncio.Task[int]"]) -> None:
        tasks += [asyncio.create_task(ask(workers, work)) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="6 images wait to be decoded, of 6") as refused:
            await ask(workers, work)
        assert (refused.value.status, refused.value.retry_s) == (503, 1)
        work.let_go.set()
        await asyncio.gather(*tasks)
        assert workers.waiting == 0
        assert await ask(workers, work)  # there is room again

    assert within(test).begun == 7


def test_what_is_late_or_wanted_by_nobody_is_not_begun() -> None:
    async def test(workers: Workers, work: Work, tasks: list["asyncio.Task[int]"]) -> None:
        gone: list[int] = []
        left = asyncio.create_task(ask(workers, work, is_gone=lambda: bool(gone)))
        with pytest.raises(RefusedError, match="its time was over") as over:
            await ask(workers, work, timeout_s=0.05)  # said while all threads are busy
        assert workers.waiting == THREADS + 1
        gone.append(1)
        work.let_go.set()
        with pytest.raises(RefusedError, match="the client has left") as nobody:
            await left
        assert (over.value.status, nobody.value.status) == (503, 499)

    assert within(test).begun == THREADS


def test_an_image_that_is_refused_is_not_kept_until_a_thread_is_free() -> None:
    class Body:
        def __call__(self) -> int:
            return 0

    async def test(workers: Workers, work: Work, tasks: list["asyncio.Task[int]"]) -> None:
        body = Body()
        kept = weakref.ref(body)
        late = asyncio.create_task(workers.run(body, 0.05, bool))
        del body
        with pytest.raises(RefusedError, match="its time was over"):
            await late
        del late
        gc.collect()
        assert kept() is None
        assert not work.let_go.is_set()

    within(test)


def test_whoever_would_wait_too_long_by_the_pace_is_refused_at_once() -> None:
    async def test(workers: Workers, work: Work, tasks: list["asyncio.Task[int]"]) -> None:
        await asyncio.sleep(0.1)
        work.let_go.set()
        await asyncio.gather(*tasks)  # 0.1 s each, at least
        work.let_go.clear()
        tasks += [asyncio.create_task(ask(workers, work)) for _ in range(THREADS)]
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="its turn would come in") as refused:
            await ask(workers, work, timeout_s=0.01)
        assert refused.value.status == 503

    within(test)


def test_a_failure_is_its_own_and_counts_no_more() -> None:
    def fails() -> int:
        raise ValueError("no image")

    async def run() -> None:
        workers = Workers(1)
        for _ in range(3):
            with pytest.raises(ValueError, match="no image"):
                await workers.run(fails, 60.0, bool)
        assert workers.waiting == 0
        workers.close()

    asyncio.run(run())

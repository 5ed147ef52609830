"""Rows of many requests meet at pathways: every request gets its own answer."""

import asyncio
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from advmoe_deploy.runtime.pathways import Rows
from advmoe_deploy.serving.online.batcher import Batcher
from advmoe_deploy.serving.online.job import OverloadedError, Times
from advmoe_deploy.serving.online.limits import Limits
from tests.serving.online.batcher.doubling import SMALL, Doubling, alive, held, image, within


@pytest.mark.parametrize("pathways", [1, 3])
def test_every_request_gets_its_own_answer(pathways: int) -> None:
    work = Doubling(pathways)

    async def test(batcher: Batcher) -> None:
        sizes = np.random.default_rng(0).integers(1, 20, 8)
        wanted = [np.arange(i, i + size) + 20 for i, size in enumerate(sizes)]
        jobs = [batcher.submit(image(*pixels), 30, alive) for pixels in wanted]
        answers = await asyncio.gather(*jobs)
        for pixels, answer in zip(wanted, answers, strict=True):
            assert answer.logits[:, 0].tolist() == (2 * pixels).tolist()
            assert answer.expert_ids["r"][:, 0].tolist() == (pixels % pathways).tolist()
        assert batcher.waiting == 0

    within(work, test)
    assert all(len(rows) <= SMALL.batch for _, rows in work.ran)


def test_rows_of_many_requests_are_routed_together_and_meet_in_their_pathway() -> None:
    work = Doubling(pathways=2)

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, work)
        rest = [batcher.submit(image(n), 30, alive) for n in range(1, 9)]
        work.open.set()
        await asyncio.gather(first, *rest)

    within(work, test)
    assert work.routed == [[0], [1, 2, 3, 4, 5, 6, 7, 8]]
    assert sorted(work.ran[1:]) == [(0, [2, 4, 6, 8]), (1, [1, 3, 5, 7])]


def test_the_times_of_a_request_are_those_of_its_wait_and_of_all_its_batches() -> None:
    work, large, small = Doubling(), Times(), Times()

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, work)
        jobs = [batcher.submit(image(*range(20, 40)), 30, alive, large)]
        jobs.append(batcher.submit(image(1), 30, alive, small))
        await asyncio.sleep(0.05)
        assert (large.wait, small.compute) == (0, 0)
        work.open.set()
        await asyncio.gather(first, *jobs)

    within(work, test)
    assert min(large.wait, small.wait) >= 0.05
    assert 0 < small.compute < large.compute


def test_routing_is_computation_and_no_wait() -> None:
    class Slow(Doubling):
        def route(self, images: NDArray[np.float32]) -> tuple[NDArray[np.int64], Rows]:
            time.sleep(0.1)
            return super().route(images)

    work, times = Slow(), Times()

    async def test(batcher: Batcher) -> None:
        began = time.monotonic()
        await batcher.submit(image(1), 30, alive, times)
        assert times.compute >= 0.1
        assert times.wait <= time.monotonic() - began - times.compute
        first = await held(batcher, work)
        waiting = batcher.submit(image(*range(20, 60)), 30, alive)  # at 0.02 s each, or more
        with pytest.raises(OverloadedError, match="its turn would come in"):
            batcher.submit(image(1), 0.5, alive)
        work.open.set()
        await asyncio.gather(first, waiting)

    within(work, test)


def test_a_large_request_takes_turns_with_a_small_one() -> None:
    work = Doubling()

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, work)
        large = batcher.submit(image(*range(100, 150)), 30, alive)
        small = batcher.submit(image(1), 30, alive)
        work.open.set()
        await asyncio.gather(first, large, small)

    within(work, test)
    assert [1 in rows for _, rows in work.ran].index(True) <= 2
    assert len(work.ran) >= 7


def test_many_answers_of_a_batch_wake_the_event_loop_once() -> None:
    work, calls = Doubling(), [0]

    async def test(batcher: Batcher) -> None:
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def counted(*of: object) -> asyncio.Handle:
            calls[0] += 1
            return call(*of)  # type: ignore[arg-type]

        first = await held(batcher, work)
        rest = [batcher.submit(image(n), 30, alive) for n in range(1, 9)]
        loop.call_soon_threadsafe = counted  # type: ignore[method-assign,assignment]
        work.open.set()
        await asyncio.gather(first, *rest)

    within(work, test)
    assert calls[0] == len(work.ran) == 2


def test_a_lane_does_not_wait_for_the_end_of_a_large_request() -> None:
    work = Doubling(pathways=2)

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, work)
        large = batcher.submit(image(*range(20, 116, 2)), 30, alive)  # all of pathway 0
        small = batcher.submit(image(1), 30, alive)
        work.open.set()
        await asyncio.gather(first, large, small)

    within(work, test)
    assert [pathway for pathway, _ in work.ran].index(1) <= 3


def test_a_batch_waits_for_those_on_their_way_and_no_longer() -> None:
    coming = [True]
    work = Doubling()

    async def test(batcher: Batcher) -> None:
        first = batcher.submit(image(1), 30, alive)
        await asyncio.sleep(0.05)
        assert not work.ran
        coming[0] = False
        second = batcher.submit(image(2), 30, alive)
        await asyncio.gather(first, second)

    limits = Limits(max_images=50, batch=8, queue=100, delay_s=20.0)
    within(work, test, limits=limits, expecting=lambda: coming[0])
    assert work.ran == [(0, [1, 2])]

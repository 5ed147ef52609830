"""The batcher: rows of many requests meet in lanes, and nobody waits for the dead."""

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from advmoe_deploy.runtime.pathways import Rows
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.serving.online.batcher import Batcher
from advmoe_deploy.serving.online.job import Done, OverloadedError, Times
from advmoe_deploy.serving.online.limits import Limits

SMALL = Limits(max_images=50, batch=8, queue=100, delay_s=0.0)


class Doubling:
    """Doubles each image's one pixel; the lane is the pixel modulo the number of lanes."""

    def __init__(self, lanes: int = 1) -> None:
        self.lanes = lanes
        self.open = threading.Event()
        self.open.set()
        self.begun = threading.Event()
        self.routed: list[list[int]] = []
        self.ran: list[tuple[int, list[int]]] = []

    def route(self, images: NDArray[np.float32]) -> tuple[NDArray[np.int64], Rows]:
        pixels = images.reshape(-1).astype(np.int64)
        self.routed.append(pixels.tolist())
        return pixels % self.lanes, Rows({"x": images})

    def count(self, rows: int) -> int:
        return rows

    def run(self, lane: int, rows: Rows) -> Prediction:
        pixels = rows.tensors["x"].reshape(-1).astype(np.int64)
        self.ran.append((lane, pixels.tolist()))
        self.begun.set()
        assert self.open.wait(timeout=30)
        if (pixels == 13).any():
            raise ValueError("thirteen")
        ids = np.full((len(pixels), 1), lane)
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


@pytest.mark.parametrize("lanes", [1, 3])
def test_every_request_gets_its_own_answer(lanes: int) -> None:
    work = Doubling(lanes)

    async def test(batcher: Batcher) -> None:
        sizes = np.random.default_rng(0).integers(1, 20, 8)
        wanted = [np.arange(i, i + size) + 20 for i, size in enumerate(sizes)]
        jobs = [batcher.submit(image(*pixels), 30, alive) for pixels in wanted]
        answers = await asyncio.gather(*jobs)
        for pixels, answer in zip(wanted, answers, strict=True):
            assert answer.logits[:, 0].tolist() == (2 * pixels).tolist()
            assert answer.expert_ids["r"][:, 0].tolist() == (pixels % lanes).tolist()
        assert batcher.waiting == 0

    within(work, test)
    assert all(len(rows) <= SMALL.batch for _, rows in work.ran)


def test_rows_of_many_requests_are_routed_together_and_meet_in_their_pathway() -> None:
    work = Doubling(lanes=2)

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


def test_the_work_of_clients_that_left_is_not_done() -> None:
    work = Doubling()

    async def test(batcher: Batcher) -> None:
        gone = threading.Event()
        first = await held(batcher, work)
        left = [batcher.submit(image(*range(20, 60)), 30, gone.is_set) for _ in range(2)]
        stays = batcher.submit(image(7), 30, alive)
        gone.set()
        work.open.set()
        await asyncio.gather(first, stays)
        for job in left:
            with pytest.raises(OverloadedError, match="left"):
                await job
        assert batcher.waiting == 0

    within(work, test)
    assert [rows for _, rows in work.ran] == [[0], [7]]


@pytest.mark.parametrize("begun", [False, True])
def test_clients_that_left_leave_no_images_while_a_batch_runs(begun: bool) -> None:
    work = Doubling()

    async def test(batcher: Batcher) -> None:
        gone = threading.Event()
        images = image(*range(20, 60))
        seen = weakref.ref(images)
        if begun:
            work.open.clear()
        else:
            first = await held(batcher, work)
        left = batcher.submit(images, 30, gone.is_set)
        del images
        while begun and not work.begun.is_set():
            await asyncio.sleep(0.001)
        assert seen() is not None
        gone.set()
        batcher.drop_dead()
        assert seen() is None
        work.open.set()
        with pytest.raises(OverloadedError, match="left"):
            await left
        if not begun:
            await first

    within(work, test)
    assert [rows for _, rows in work.ran] == [list(range(20, 28)) if begun else [0]]


def test_of_many_that_wait_the_dead_are_found_in_their_turn_and_not_looked_for_each_time() -> None:
    work, asked = Doubling(), [0]

    def counted() -> bool:
        asked[0] += 1
        return gone[0]

    gone = [False]

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, work)
        waiting = [batcher.submit(image(5), 30, counted) for _ in range(999)]
        for _ in range(50):
            with pytest.raises(OverloadedError, match="1000 images wait"):
                batcher.submit(image(1), 30, alive)
        assert asked[0] < 50 * 999 / 2
        gone[0] = True
        work.open.set()
        await first
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, OverloadedError) for result in results)

    within(work, test, limits=Limits(max_images=50, batch=8, queue=1000, delay_s=0.0))
    assert [rows for _, rows in work.ran] == [[0]]


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


def test_what_is_late_is_not_computed() -> None:
    work = Doubling()

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, work)
        late = batcher.submit(image(5), 0.0, alive)
        work.open.set()
        await first
        with pytest.raises(OverloadedError, match="time was over"):
            await late

    within(work, test)
    assert [rows for _, rows in work.ran] == [[0]]


def test_what_has_begun_is_finished_though_it_takes_long() -> None:
    work = Doubling()

    async def test(batcher: Batcher) -> None:
        work.open.clear()
        job = batcher.submit(image(*range(20, 40)), 0.2, alive)
        while not work.begun.is_set():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.3)
        work.open.set()
        assert (await job).logits[:, 0].tolist() == [2 * n for n in range(20, 40)]

    within(work, test)


def test_what_is_being_computed_is_finished_though_others_come_after_its_time() -> None:
    work = Doubling()

    async def test(batcher: Batcher) -> None:
        work.open.clear()
        job = batcher.submit(image(*range(20, 28)), 0.2, alive)
        while not work.begun.is_set():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.3)
        batcher.drop_dead()
        work.open.set()
        assert (await job).logits[:, 0].tolist() == [2 * n for n in range(20, 28)]

    within(work, test)


def test_a_lane_does_not_wait_for_the_end_of_a_large_request() -> None:
    work = Doubling(lanes=2)

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, work)
        large = batcher.submit(image(*range(20, 116, 2)), 30, alive)  # all of lane 0
        small = batcher.submit(image(1), 30, alive)
        work.open.set()
        await asyncio.gather(first, large, small)

    within(work, test)
    assert [lane for lane, _ in work.ran].index(1) <= 3


def test_a_full_queue_refuses_at_once_until_the_dead_are_gone() -> None:
    work = Doubling()

    async def test(batcher: Batcher) -> None:
        gone = threading.Event()
        first = await held(batcher, work)
        waiting = [batcher.submit(image(*range(20, 69)), 30, gone.is_set) for _ in range(2)]
        assert batcher.waiting == 99
        with pytest.raises(OverloadedError, match="99 images wait") as refused:
            batcher.submit(image(1, 2), 30, alive)
        assert refused.value.retry_s >= 1
        gone.set()
        after = batcher.submit(image(1, 2), 30, alive)
        work.open.set()
        await asyncio.gather(first, after)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, OverloadedError) for result in results)

    within(work, test)


def test_a_failure_is_the_answer_of_its_own_batch_alone() -> None:
    work = Doubling()

    async def test(batcher: Batcher) -> None:
        with pytest.raises(ValueError, match="thirteen"):
            await batcher.submit(image(13), 30, alive)
        answer = await batcher.submit(image(4), 30, alive)
        assert answer.logits.tolist() == [[8]]
        assert batcher.waiting == 0

    within(work, test)


def test_a_failure_of_routing_is_an_answer_and_does_not_end_the_thread() -> None:
    class Odd(Doubling):
        def route(self, images: NDArray[np.float32]) -> tuple[NDArray[np.int64], Rows]:
            lanes, rows = super().route(images)
            return (lanes.astype(object) + 0.5j if 13 in images else lanes), rows

    work = Odd()

    async def test(batcher: Batcher) -> None:
        with pytest.raises(TypeError):
            await batcher.submit(image(13), 30, alive)
        assert (await batcher.submit(image(4), 30, alive)).logits.tolist() == [[8]]
        assert batcher.waiting == 0

    within(work, test)


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


def test_whoever_watches_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        def watch(_: Done) -> None:
            raise KeyError("blind")

        batcher = Batcher(Doubling(), SMALL, watch=watch)
        batcher.start()
        for _ in range(2):
            assert (await batcher.submit(image(3), 30, alive)).logits.tolist() == [[6]]
        batcher.close()

    asyncio.run(asyncio.wait_for(run(), timeout=60))
    assert "a batch was not counted" in caplog.text


def test_closing_does_not_wait_for_the_queue() -> None:
    work = Doubling()

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, work)
        batcher.submit(image(2), 30, alive)
        threading.Timer(0.05, work.open.set).start()
        batcher.close()
        await first

    within(work, test)
    assert [rows for _, rows in work.ran] == [[0]]


def test_a_failure_between_batches_is_an_answer_and_does_not_end_the_thread() -> None:
    class Odd(Doubling):
        def count(self, rows: int) -> int:
            if rows == 2:
                raise TypeError("two")
            return rows

    work = Odd()

    async def test(batcher: Batcher) -> None:
        with pytest.raises(TypeError, match="two"):
            await batcher.submit(image(1, 3), 30, alive)
        assert (await batcher.submit(image(4), 30, alive)).logits.tolist() == [[8]]
        assert batcher.waiting == 0

    within(work, test)

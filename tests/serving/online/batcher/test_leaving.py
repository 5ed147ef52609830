"""Nobody waits for the dead: clients that left, times that are over, a full queue, the end."""

import asyncio
import threading
import weakref

import pytest

from advmoe_deploy.serving.online.batcher import Batcher
from advmoe_deploy.serving.online.job import OverloadedError
from advmoe_deploy.serving.online.limits import Limits
from tests.serving.online.batcher.doubling import Doubling, alive, held, image, within


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
        images = image(*range(20, 60)).copy()  # which has its memory itself
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


def test_what_is_late_is_not_computed() -> None:
    work = Doubling()

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, work)
        late = batcher.submit(image(5), 0.05, alive)
        await asyncio.sleep(0.1)
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

"""A failure is the answer of its own batch and does not end the thread."""

import asyncio

import numpy as np
import pytest
from numpy.typing import NDArray

from advmoe_deploy.runtime.pathways import Rows
from advmoe_deploy.serving.online.batcher import Batcher
from advmoe_deploy.serving.online.job import Done
from tests.serving.online.batcher.doubling import SMALL, Doubling, alive, image, within


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
            pathways, rows = super().route(images)
            return (pathways.astype(object) + 0.5j if 13 in images else pathways), rows

    work = Odd()

    async def test(batcher: Batcher) -> None:
        with pytest.raises(TypeError):
            await batcher.submit(image(13), 30, alive)
        assert (await batcher.submit(image(4), 30, alive)).logits.tolist() == [[8]]
        assert batcher.waiting == 0

    within(work, test)


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

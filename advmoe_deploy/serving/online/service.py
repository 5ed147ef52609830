"""One model online: its queue, and whether it is warm."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import numpy as np

from advmoe_deploy.errors import MachineError
from advmoe_deploy.process import step_back
from advmoe_deploy.runtime.pathways import work_of
from advmoe_deploy.runtime.runner import Prediction, Runner, joined
from advmoe_deploy.serving.online.batcher import Batcher
from advmoe_deploy.serving.online.golden import Golden
from advmoe_deploy.serving.online.job import Done, OverloadedError, Times
from advmoe_deploy.serving.online.limits import Budget, Limits
from advmoe_deploy.serving.online.metrics import Metrics
from advmoe_deploy.serving.online.operations.monitor import Monitor
from advmoe_deploy.serving.online.operations.requests import Record
from advmoe_deploy.serving.online.protocol import (
    CLIENT_LEFT,
    ClientLeftError,
    InferRequest,
    NotReadyError,
    RefusedError,
    ServedModel,
)
from advmoe_deploy.serving.online.turns import Turns
from advmoe_deploy.serving.online.workers import Workers

# Below these a body is read, and an answer written, where the event loop runs: within a
# millisecond, which is what handing it to another thread and back would cost.
SMALL_BODY = 32 << 10
FEW_IMAGES = 64
_READERS = 2

T = TypeVar("T")


class Arrival:
    """A request on its way into the queue of ``service``: it counts there until it waits or ends.

    A context manager, to be entered by whoever reads the request.
    """

    def __init__(self, service: "Service", times: Times | None = None) -> None:
        self.service, self.times = service, times or Times()
        self.heard = time.monotonic()  # when the last piece came; infinity once all is here
        service.arrivals.add(self)

    def hear(self, *, more: bool) -> None:
        """Note that a piece of the body came, and whether there are ``more``."""
        self.heard = time.monotonic() if more else math.inf

    def end(self) -> None:
        """Count no more: the request waits, or will not."""
        self.service.arrivals.discard(self)

    def __enter__(self) -> "Arrival":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Shared:
    """Memory and threads that the models of a server share.

    Those for large bodies have no limit but the memory; images are small until they are decoded.
    """

    def __init__(self, limits: Limits) -> None:
        self.budget = Budget(limits.memory)
        # Behind the event loop, which would wait for them where they share its core.
        self.threads = ThreadPoolExecutor(_READERS, "read", initializer=step_back)
        self.decoders = Workers(limits.queue)
        self.answers = Turns()

    def close(self) -> None:
        """End the threads."""
        self.decoders.close()
        self.threads.shutdown(wait=True, cancel_futures=True)


class Service:
    """One model and the thread that runs it; what is ``shared`` belongs to whoever made it."""

    def __init__(
        self,
        model: ServedModel,
        runner: Runner,
        shared: Shared,
        golden: Golden | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """Take what answers ``model``; ``release`` is called once it will compute no more."""
        self.model, self._runner, self._golden = model, runner, golden
        self._release = ExitStack()
        self._release.callback(release)
        self.warm = False
        self._warming = 0  # images of the warm-up that are not computed yet
        self.budget = shared.budget
        self.arrivals = set[Arrival]()
        self._shared = shared
        self.metrics = Metrics(self._now, Monitor(model.recorded, model.limits.window))
        self._batcher = Batcher(
            work_of(runner),
            model.limits,
            expecting=lambda: self.expecting,
            watch=self._watch,
        )

    @property
    def waiting(self) -> int:
        """Images without an answer."""
        return self._batcher.waiting

    @property
    def idle(self) -> bool:
        """Whether no request is in the queue, nor on its way there."""
        return not self.reading and not self.waiting

    @property
    def reading(self) -> int:
        """Requests on their way into the queue."""
        return len(self.arrivals)

    @property
    def expecting(self) -> bool:
        """Whether one of them is here, or a piece of it came so lately that the rest may follow."""
        since = time.monotonic() - self.model.limits.delay_s
        # The thread that computes asks, and a copy is made in one go.
        return any(each.heard >= since for each in list(self.arrivals))

    def _now(self) -> dict[str, float]:
        return {
            "model_warm": float(self.warm),
            "waiting_images": float(self.waiting),
            "requests_being_read": float(self.reading),
        }

    def _watch(self, done: Done) -> None:
        """Count a batch; the first images are those that warm up, which are no request's."""
        counted = self.metrics.batch if self._warming <= 0 else self.metrics.warm_up
        self._warming -= len(done.answer.logits)
        counted(done)

    def start(self) -> None:
        """Begin to compute for the running event loop."""
        self._batcher.start()

    async def warm_up(self, is_stopping: Callable[[], bool]) -> None:
        """Run the golden images, or else one, through queue and engine, batch by batch.

        It is not warm afterwards if the server is stopping.

        Raises:
            CheckFailedError: the answers to golden images are not those of the bundle.
            Exception: whatever the engine raises.
        """
        golden, one = self._golden, np.zeros((1, *self.model.image_shape), dtype=np.float32)
        images = one if golden is None else golden.images
        self._warming = len(images)
        at_once = min(self.model.limits.batch, self.model.limits.queue)
        answers = list[Prediction]()
        for part in np.split(images, range(at_once, len(images), at_once)):
            if is_stopping():
                return
            answers.append(await self._batcher.submit(part, math.inf, lambda: False))
        if golden is not None:
            await self.run(False, partial(golden.require, joined(answers), self._runner))
            self._golden = None  # its images have served
        self.warm = True

    def close(self) -> None:
        """Wait for the running batch, end the thread and release the runner."""
        self._batcher.close()
        self._release.close()

    def require_warm(self) -> None:
        """Raise :class:`NotReadyError` before the warm-up has ended."""
        if not self.warm:
            raise NotReadyError("the model is not ready; ask /v2/health/ready")

    def overload(self) -> OverloadedError | None:
        """Return why not even a request of one image would be answered in time, if that is so."""
        return self._batcher.overload(self.model.limits.timeout_s)

    def drop_dead(self) -> None:
        """Let go of the requests whose clients have left or whose time is over."""
        self._batcher.drop_dead()

    async def predict(
        self, request: InferRequest, is_gone: Callable[[], bool], arrival: Arrival
    ) -> Prediction:
        """Return the answer to ``request``, whose ``arrival`` ends with it in the queue.

        Raises:
            RefusedError: it cannot be computed, or not in time, or its client has left.
        """
        limit = self.model.limits.timeout_s
        timeout_s = limit if request.timeout_s is None else min(limit, request.timeout_s)
        try:
            waiting = self._batcher.submit(request.images, timeout_s, is_gone, arrival.times)
            arrival.end()
            prediction = await waiting
        except OverloadedError as error:
            await self._shared.answers.take()
            if is_gone():
                raise ClientLeftError from None
            raise RefusedError(f"overloaded: {error}", 503, retry_s=error.retry_s) from None
        except asyncio.CancelledError:
            self.drop_dead()  # now: the memory of its images is given back
            raise
        except MachineError as error:
            raise RefusedError(str(error), 503, retry_s=1) from None
        # A batch ends for all its requests at once, and several of small ones in a moment.
        await self._shared.answers.take()
        if is_gone():
            raise ClientLeftError
        return prediction

    async def decode(self, work: Callable[[], T], is_gone: Callable[[], bool]) -> T:
        """Return what ``work`` returns, which decodes an image file, in a thread for that.

        Raises:
            RefusedError: too many wait for that, or for too long (503), or the client has left.
        """
        return await self._shared.decoders.run(work, self.model.limits.timeout_s, is_gone)

    def sign(self, record: Record) -> None:
        """Note on ``record`` which model and engine are asked."""
        record.model, record.engine = self.model, self._runner.name

    @contextmanager
    def counted(
        self, began: float, record: Record, left: Callable[[], int] = lambda: 0
    ) -> Iterator[Times]:
        """Count the request that the block answers, which ``began`` by the performance counter.

        The block fills in the times, which its ``record`` gets as well. ``left`` returns the status
        of one whose client has left, and 0 while it is there.
        """
        status, times = 500, Times()
        self.sign(record)
        record.times = times
        try:
            yield times
            status = 200
        except RefusedError as error:
            status = error.status
            raise
        except asyncio.CancelledError:
            status = CLIENT_LEFT
            raise
        finally:
            self.metrics.request(left() or status, time.perf_counter() - began, times)

    async def run(self, here: bool, work: Callable[[], T]) -> T:
        """Return what ``work`` returns, done ``here`` or else in a thread that reads and writes."""
        if here:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._shared.threads, work)

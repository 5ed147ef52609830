"""One model online: its queue, its memory, and whether it is ready."""

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from advmoe_deploy.errors import MachineError
from advmoe_deploy.runtime.pathways import work_of
from advmoe_deploy.runtime.runner import Prediction, Runner
from advmoe_deploy.serving.online.batcher import Batcher, OverloadedError
from advmoe_deploy.serving.online.limits import Budget, Hold
from advmoe_deploy.serving.online.metrics import Metrics
from advmoe_deploy.serving.online.protocol import InferRequest, RefusedError, ServedModel

# Below these a body is read, and an answer written, where the event loop runs: within a
# millisecond, which is what handing it to another thread and back would cost.
SMALL_BODY = 32 << 10
FEW_IMAGES = 64
_READERS = 2

# The status of a request whose client left before its answer; nobody sees it but the metrics.
CLIENT_LEFT = 499

T = TypeVar("T")


class Arrival:
    """A request on its way into the queue of ``service``: it counts there until it waits or ends.

    A context manager, to be entered by whoever reads the request.
    """

    def __init__(self, service: "Service") -> None:
        self._service, self._here = service, False
        service.reading += 1

    def end(self) -> None:
        """Count no more: the request waits, or will not."""
        self._service.reading -= not self._here
        self._here = True

    def __enter__(self) -> "Arrival":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Service:
    """One model, the thread that runs it, and others that read large bodies meanwhile."""

    def __init__(self, model: ServedModel, runner: Runner) -> None:
        self.model = model
        self.failure: BaseException | None = None
        self.is_stopping: Callable[[], bool] = lambda: False
        self.budget = Budget(model.limits.memory)
        self.reading = 0  # requests on their way into the queue
        self._warm = False
        self.metrics = Metrics(self._now)
        self._batcher = Batcher(
            work_of(runner, self.metrics.scores),
            model.limits,
            expecting=lambda: self.reading,
            watch=self.metrics.batch,
        )
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read")

    @property
    def ready(self) -> bool:
        """Whether requests should come here."""
        return self._warm and not self.is_stopping()

    @property
    def waiting(self) -> int:
        """Images without an answer."""
        return self._batcher.waiting

    @property
    def busy(self) -> bool:
        """Whether a request is being read, computed or written."""
        return self.waiting > 0 or self.budget.used > 0

    def _now(self) -> dict[str, float]:
        return {
            "ready": float(self.ready),
            "waiting_images": float(self.waiting),
            "held_bytes": float(self.budget.used),
            "requests_being_read": float(self.reading),
        }

    def start(self) -> None:
        """Begin to compute for the running event loop."""
        self._batcher.start()

    async def warm_up(self) -> None:
        """Run one image through the model; ``ready`` or ``failure`` says how it went."""
        image = np.zeros((1, *self.model.image_shape), dtype=np.float32)
        try:
            await self._batcher.submit(image, math.inf, lambda: False)
            self._warm = True
        except Exception as error:  # noqa: BLE001, RUF100 - kept for whoever started the server
            self.failure = error

    def close(self) -> None:
        """Wait for the running batch and end the threads."""
        self._batcher.close()
        self._readers.shutdown(wait=True, cancel_futures=True)

    def require_warm(self) -> None:
        """Raise :class:`RefusedError` (503) before the warm-up has ended."""
        if not self._warm:
            raise RefusedError("the model is not ready; ask /v2/health/ready", 503, retry_s=1)

    def reserve(self, hold: Hold, count: int) -> bool:
        """Return whether ``hold`` may grow to ``count`` bytes, and let it."""
        if hold.grow(count):
            return True
        self._batcher.drop_dead()  # their memory is given back a moment later
        return False

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
            waiting = self._batcher.submit(request.images, timeout_s, is_gone)
            arrival.end()
            return await waiting
        except OverloadedError as error:
            status = CLIENT_LEFT if is_gone() else 503
            raise RefusedError(f"overloaded: {error}", status, retry_s=error.retry_s) from None
        except MachineError as error:
            raise RefusedError(str(error), 503, retry_s=1) from None

    async def run(self, here: bool, work: Callable[[], T]) -> T:
        """Return what ``work`` returns, done ``here`` or else in a thread that reads and writes."""
        if here:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

"""The call that answers inference requests over gRPC."""

import time
from typing import Any

from advmoe_deploy.serving.online.grpc.gate import Gate
from advmoe_deploy.serving.online.grpc.messages import (
    Asked,
    asked_of,
    read_request,
    write_response,
)
from advmoe_deploy.serving.online.limits import COPIES_OF_BINARY, Hold
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.operations.requests import Record
from advmoe_deploy.serving.online.service import FEW_IMAGES, SMALL_BODY, Arrival, Service
from advmoe_deploy.serving.online.turns import Turns


class Infer:
    """Reads a message within the limits, has it answered, and writes the answer."""

    def __init__(self, models: Models, gate: Gate) -> None:
        self._models, self._gate = models, gate
        self._turns = Turns()

    async def __call__(self, context: Any, record: Record) -> bytes:
        """Answer one call, and fill in its ``record``.

        Raises:
            RefusedError: it is not answered, and why.
        """
        record.infers = True
        await self._turns.take()
        began = time.perf_counter()
        asked = asked_of(await self._gate.read(context))
        service = self._models.find(
            asked.message.model_name, asked.message.model_version, to_infer=True
        )
        with service.counted(began, record):
            service.require_warm()
            with service.budget.hold() as hold:
                return await self._answer(service, asked, hold, context, began, record)

    async def _answer(
        self,
        service: Service,
        asked: Asked,
        hold: Hold,
        context: Any,
        began: float,
        record: Record,
    ) -> bytes:
        times = record.times
        assert times is not None
        self._models.charge(hold, COPIES_OF_BINARY * asked.size)
        with Arrival(service, times) as arrival:
            arrival.hear(more=False)
            try:
                request = await service.run(
                    asked.size <= SMALL_BODY,
                    lambda: read_request(asked, service.model, context.time_remaining()),
                )
            finally:  # a reader's thread may hold on to it after the call was cancelled
                asked.clear()
            record.images = len(request.images)
            self._models.charge(hold, request.images.nbytes)
            hold.shrink(request.images.nbytes)
            times.read = time.perf_counter() - began
            # A call whose client has left, or whose deadline is over, is cancelled by the library.
            prediction = await service.predict(request, lambda: False, arrival)
        began = time.perf_counter()
        answer = await service.run(
            len(request.images) <= FEW_IMAGES,
            lambda: write_response(prediction, request, service.model),
        )
        times.write = time.perf_counter() - began
        return answer

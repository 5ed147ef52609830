"""Requests that would wait in vain, told so from their heads alone: the work of refusing counts.

At four times the load that a server can carry, three of four requests are refused; what is spent on
reading and parsing them is not there to compute the others.
"""

import re
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from advmoe_deploy.serving.online.job import Times
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.protocol import RefusedError

_TO_INFER = re.compile(rb"/v2/models/([\w.~-]+)(?:/versions/(\d+))?/(?:infer|image)")
# The longest body that is dropped so that its connection stays; beyond it a new one costs less.
_SHORT_BYTES = 256 << 10


class Shed(NamedTuple):
    """Why a request is refused, and in how many seconds it may be worth another try."""

    reason: str
    retry_s: int


Shedding = Callable[[bytes], "Shed | None"]


def shedding(models: Models) -> Shedding:
    """Return what says of the target of a request whether its model has no room, and counts it."""

    def shed(target: bytes) -> Shed | None:
        began = time.perf_counter()
        found = _TO_INFER.fullmatch(target)
        if found is None:
            return None
        name, version = (part.decode() for part in (found[1], found[2] or b""))
        try:
            service = models.find(name, version)
        except RefusedError:
            return None  # whoever reads the request says which there are
        overload = service.overload()
        if overload is None:
            return None
        service.metrics.request(503, time.perf_counter() - began, Times())
        return Shed(f"overloaded: {overload}", overload.retry_s)

    return shed


def is_short(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether the body of a request, by its headers, is so short that it may be dropped."""
    length = next((value for name, value in headers if name == b"content-length"), None)
    return length is not None and int(length) <= _SHORT_BYTES

"""One request as the server's operator sees it: its id, and what is told once it has ended."""

import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from advmoe_deploy.serving.online.job import Times
from advmoe_deploy.serving.online.protocol import ServedModel

# Name of the header, and of the metadata over gRPC, that has the id.
REQUEST_ID = "x-request-id"
# That of the W3C which says whose part a request is: https://www.w3.org/TR/trace-context/
PARENT = "traceparent"
_HEADERS = REQUEST_ID.encode(), PARENT.encode()
_GIVEN = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass
class Record:
    """One request over ``protocol``, ``http`` or ``grpc``; filled in while it is answered.

    Attributes:
        name: its path, or the name of its call.
        method: of HTTP.
        parent: what it says to be part of, unchecked.
        status: that of HTTP, over gRPC as well.
        answered: whether its client was there when the answer was sent.
        infers: whether it asks for an inference; ``model``, ``engine``, ``images`` and ``times``
            are known of those alone, each as soon as it is.
        began: by the performance counter.
        seconds: from there to its end.
    """

    protocol: str
    id: str
    name: str = ""
    method: str = ""
    parent: str = ""
    status: int = 500
    answered: bool = False
    infers: bool = False
    model: ServedModel | None = None
    engine: str = ""
    images: int = 0
    times: Times | None = None
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0


# What is told of every request that has ended.
Watcher = Callable[[Record], None]


def record_of(headers: Mapping[bytes, bytes]) -> Record:
    """Return the record of a request over HTTP that has just come, by its ``headers``."""
    given, parent = (headers.get(name, b"").decode("latin-1") for name in _HEADERS)
    return Record("http", id_of(given), parent=parent)


def id_of(given: str) -> str:
    """Return the id that a client has ``given``, if it is one, or a new one."""
    if given and _GIVEN.fullmatch(given):
        return given
    return f"{random.getrandbits(128):032x}"  # to be told apart, not to be secret


def tell(record: Record, watchers: Iterable[Watcher]) -> None:
    """End ``record`` and show it to all ``watchers``."""
    record.seconds = time.perf_counter() - record.began
    for watch in watchers:
        watch(record)

"""Clients of a server: raw HTTP over asyncio, closed loop or at a rate, and a probe of health."""

import asyncio
import errno
import json
import os
import resource
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import Event, Process, Queue
from typing import Any

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]

HOST = "127.0.0.1"
# Of a client, for all that is no connection to the server.
_OWN_DESCRIPTORS = 128


@dataclass
class Sample:
    """What came of many requests; ``answers`` counts statuses, and 0 for no answer at all."""

    seconds: float = 0.0
    answers: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)  # of those with 200
    unanswered: Counter[str] = field(default_factory=Counter)  # why, of those with 0
    late_s: float = 0.0  # by how much the client itself fell behind its own times, at most
    not_asked: int = 0  # requests for which the client had no connection left: its own limit

    def count(self, status: int, client: "Client", seconds: float) -> None:
        """Take in the answer that ``client`` had after so long."""
        self.answers[status] += 1
        if status == 200:
            self.latencies_s.append(seconds)
        if status == 0:
            self.unanswered[client.failure] += 1

    def summary(self) -> dict[str, Any]:
        """Return what goes into a result."""
        ms = 1e3 * np.array(self.latencies_s or [np.nan])
        p50, p90, p99 = np.percentile(ms, [50, 90, 99]).round(3).tolist()
        return {
            "seconds": round(self.seconds, 3),
            "answers": {str(status): count for status, count in sorted(self.answers.items())},
            **({"not_asked": self.not_asked} if self.not_asked else {}),
            **({"unanswered": dict(self.unanswered)} if self.unanswered else {}),
            **({"client_late_ms": round(1e3 * self.late_s, 3)} if self.late_s else {}),
            "per_s": round(self.answers[200] / self.seconds, 2),
            "p50_ms": p50,
            "p90_ms": p90,
            "p99_ms": p99,
        }


class Client:
    """One connection that is kept alive, and opened again where the server closes it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.failure = ""  # why the last request had no answer

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._streams is not None

    async def connect(self) -> None:
        """Open the connection."""
        self._streams = await asyncio.open_connection(HOST, self._port)

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Return status and body; 0 where there is no answer."""
        try:
            if self._streams is None:
                await self.connect()
            assert self._streams
            reader, writer = self._streams
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            body = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError) as error:
            self.failure = f"{'connected' if self._streams else 'connecting'}: {_why(error)}"
            self.close()
            return 0, b""
        if b"connection: close" in head:
            self.close()
        return int(head.split(None, 2)[1]), body

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def _why(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    return errno.errorcode.get(number or 0, type(error).__name__)


def many_descriptors() -> None:
    """Let this process hold as many connections as the system allows it."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def binary_request(model: str, images: "np.ndarray[Any, np.dtype[np.float32]]") -> bytes:
    """Return the text of a request with binary tensors both ways."""
    tensor = {
        "name": "images",
        "datatype": "FP32",
        "shape": list(images.shape),
        "parameters": {"binary_data_size": images.nbytes},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    lines = [
        f"POST /v2/models/{model}/infer HTTP/1.1",
        "Host: localhost",
        f"Content-Length: {len(head) + images.nbytes}",
        f"Inference-Header-Content-Length: {len(head)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + head + images.tobytes()


async def together(
    one: Callable[[Sample, float], Awaitable[None]], clients: int, seconds: float
) -> Sample:
    """Run so many clients, each with the sample and the time at which it is to stop."""
    sample, began = Sample(), time.perf_counter()
    await asyncio.gather(*(one(sample, began + seconds) for _ in range(clients)))
    sample.seconds = time.perf_counter() - began
    return sample


def closed_loop(port: int, request: bytes, clients: int, seconds: float) -> Sample:
    """Let each of so many clients ask again as soon as it is answered; 503 waits 50 ms."""

    async def one(sample: Sample, until: float) -> None:
        client = Client(port)
        while (began := time.perf_counter()) < until:
            status, _ = await client.ask(request)
            sample.count(status, client, time.perf_counter() - began)
            if status != 200:
                await asyncio.sleep(0.05)
        client.close()

    return asyncio.run(together(one, clients, seconds))


def evenly(per_s: float, seconds: float) -> Times:
    """Return times to ask at, in seconds, at even intervals: ``perf_analyzer``'s own choice."""
    return np.arange(1, int(per_s * seconds) + 1) / per_s


def randomly(per_s: float, seconds: float) -> Times:
    """Return times to ask at, in seconds, as clients do who know nothing of each other."""
    return np.cumsum(np.random.default_rng(0).exponential(1 / per_s, int(per_s * seconds)))


def open_loop(port: int, request: bytes, times: Times) -> Sample:
    """Ask at the ``times`` given, however long answers take.

    What finds no connection idle, and none left to be opened, is the client's failure: not asked.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OWN_DESCRIPTORS
    opened = 0

    async def one(sample: Sample, idle: list[Client], at: float) -> None:
        nonlocal opened
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        sample.late_s = max(sample.late_s, time.perf_counter() - at)
        if not idle and opened >= most:
            sample.not_asked += 1
            return
        opened += not idle
        client = idle.pop() if idle else Client(port)
        status, _ = await client.ask(request)
        sample.count(status, client, time.perf_counter() - at)
        idle.append(client)

    async def run() -> Sample:
        sample, idle, began = Sample(), list[Client](), time.perf_counter() + 0.1
        await asyncio.gather(*(one(sample, idle, began + at) for at in times))
        sample.seconds = time.perf_counter() - began
        for client in idle:
            client.close()
        return sample

    return asyncio.run(run())


@contextmanager
def probed(port: int, pid: int, pause_s: float = 0.02) -> Iterator[dict[str, Any]]:
    """Yield a dictionary that holds, after the block, health's latencies and the peak memory.

    Health is asked again ``pause_s`` after its answer; the block begins after the first one.
    """
    begun, stop, result = Event(), Event(), dict[str, Any]()
    found: Queue[Any] = Queue()
    probe = Process(target=_probe, args=(port, pid, pause_s, begun, stop, found), daemon=True)
    probe.start()
    begun.wait(timeout=60)
    try:
        yield result
    finally:
        stop.set()
        latencies_s, memory = found.get(timeout=60)
        probe.join()
        ms = 1e3 * np.array(latencies_s)
        result["health_n"] = len(ms)
        result["health_p99_ms"] = round(float(np.percentile(ms, 99)), 3)
        result["health_max_ms"] = round(float(ms.max()), 3)
        result["memory_mib"] = round(memory / 1024, 1)


def _probe(port: int, pid: int, pause_s: float, begun: Any, stop: Any, found: Any) -> None:
    with suppress(PermissionError):  # ahead of the clients, so that it waits for the server alone
        os.nice(-10)
    request = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def run() -> tuple[list[float], int]:
        client, latencies_s, memory = Client(port), list[float](), 0
        await client.ask(request)  # before the block, and not counted
        begun.set()
        while not latencies_s or not stop.is_set():  # once at least, however short the block
            began = time.perf_counter()
            status, _ = await client.ask(request)
            latencies_s.append(time.perf_counter() - began if status == 200 else float("inf"))
            memory = max(memory, memory_of(pid))
            await asyncio.sleep(pause_s)
        return latencies_s, memory

    found.put(asyncio.run(run()))


def memory_of(pid: int) -> int:
    """Return the resident memory of a process in KiB."""
    with suppress(OSError), open(f"/proc/{pid}/status") as file:  # noqa: PTH123
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    return 0

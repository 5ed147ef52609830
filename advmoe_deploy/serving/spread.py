"""Batch inference by Ray: spans of the inputs on many processes or machines, rows in order.

A span is a fixed number of batches. Its rows come back to the process that began, which alone
writes: it keeps them in the order of the inputs, so that a run may be begun with Ray and resumed
without, or the reverse. The span of a worker that dies is done again by another.
"""

import os
import secrets
import socket
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.errors import BundleError, MachineError, UsageError, missing_extra
from advmoe_deploy.process import usable_cpus
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.classify import MOST_DECODERS, FileClassifier, Window
from advmoe_deploy.serving.parts import Inputs
from advmoe_deploy.serving.rows import RowFormat

_BATCHES_PER_SPAN = 16
_TRIES = 3
_ADDRESS = "RAY_ADDRESS"
_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_SECONDS_TO_ANSWER = 10


@dataclass(frozen=True)
class SpreadJob:
    """Job of a worker: the bundle by ``folder`` and ``identity``, and how it is run.

    Relative paths of inputs are relative to ``cwd``. ``threads`` are those of one worker.
    """

    folder: Path
    identity: str
    cwd: Path
    columns: RowFormat
    engine: str
    threads: int
    batch: int

    @classmethod
    def of(
        cls, bundle: Bundle, columns: RowFormat, engine: str, threads: int, batch: int
    ) -> "SpreadJob":
        """Return the job of this process, with a thread per worker unless told otherwise."""
        folder, cwd = bundle.path.resolve(), Path.cwd()
        return cls(folder, bundle.identity, cwd, columns, engine, threads or 1, batch)


@contextmanager
def windows_by_ray(job: SpreadJob, inputs: Inputs, start: int) -> Iterator[Iterator[Window]]:
    """Yield what yields the rows of the inputs from ``start`` on, a batch at a time and in order.

    ``$RAY_ADDRESS`` names a cluster, all machines of which see the bundle and the inputs under the
    same paths; without it, Ray starts on this machine and ends with the block.

    Raises:
        BackendUnavailableError: Ray is not installed.
        UsageError: no machine has as many CPUs as a worker needs.
        MachineError: Ray does not start, or workers kept dying.
    """
    ray = _ray()
    with (
        _cluster(ray, job.threads) as cpus,
        closing(_spans(ray, job, inputs, start, cpus // job.threads)) as windows,
    ):
        yield windows


def _spans(
    ray: Any, job: SpreadJob, inputs: Inputs, start: int, workers: int
) -> Generator[Window, None, None]:
    """Yield the rows of one span after the other; each worker has one, and one waits for it."""
    most = 2 * max(1, workers)
    work = ray.remote(num_cpus=job.threads, max_retries=_TRIES)(_work)
    shared = ray.put(inputs)
    span = job.batch * _BATCHES_PER_SPAN
    waiting: deque[Any] = deque()
    for first in range(start, len(inputs), span):
        # In a list a reference stays one, and a worker fetches the inputs once for all spans.
        waiting.append(work.remote(job, [shared], first, min(first + span, len(inputs))))
        if len(waiting) == most:
            yield from _result(ray, waiting.popleft())
    while waiting:
        yield from _result(ray, waiting.popleft())


def _result(ray: Any, reference: Any) -> list[Window]:
    try:
        windows: list[Window] = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        reason = str(error).strip().partition("\n")[0]
        raise MachineError(
            f"Ray's workers ended {_TRIES + 1} times before their rows were done ({reason:.200}); "
            "give them more memory, or leave out the input that ends them"
        ) from None
    return windows


def _work(job: SpreadJob, inputs: list[Any], start: int, stop: int) -> list[Window]:
    """Classify a span, in a worker."""
    os.chdir(job.cwd)
    bundle, runner = _runner(job)
    decoders = min(MOST_DECODERS, job.threads)
    classifier = FileClassifier(runner, job.columns, bundle.manifest.decoding, decoders)
    return list(classifier.windows(_fetched(inputs[0]), start, stop, job.batch))


@lru_cache(maxsize=1)
def _runner(job: SpreadJob) -> tuple[Bundle, Runner]:
    bundle = open_bundle(job.folder)
    if bundle.identity != job.identity:
        raise BundleError(f"{job.folder} is another bundle where a worker runs; copy it there")
    return bundle, open_runner(bundle, job.engine, threads=job.threads)


@lru_cache(maxsize=1)
def _fetched(reference: Any) -> Inputs:
    inputs: Inputs = _ray().get(reference)
    return inputs


@contextmanager
def _cluster(ray: Any, threads: int) -> Iterator[int]:
    """Yield the CPUs of the cluster, which ends with the block if it was begun here."""
    with ExitStack() as stack:
        if not ray.is_initialized():
            stack.enter_context(_own_token())
            _begin(ray, threads)
            stack.callback(ray.shutdown)
        cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        if max(cpus, default=0) < threads:
            raise UsageError(
                f"--threads {threads}: no machine of the cluster has as many CPUs; pass fewer"
            )
        yield sum(cpus)


@contextmanager
def _own_token() -> Iterator[None]:
    """Let the Ray that begins within the block have a token, unless it is told one, or where it is.

    It listens on every interface, and without a token of ours keeps one for all to read.
    """
    if os.environ.get(_ADDRESS) or any(name in os.environ for name in _TOKENS):
        yield
        return
    os.environ[_TOKENS[0]] = _secret()
    try:
        yield
    finally:
        os.environ.pop(_TOKENS[0], None)


@cache
def _secret() -> str:
    """Return the token of this process, which Ray reads once and keeps."""
    return secrets.token_hex(32)


def _begin(ray: Any, threads: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get(_ADDRESS)
    if not address:
        quiet |= {"include_dashboard": False, "num_cpus": max(threads, usable_cpus())}
    try:
        if address:
            _require_answer(address)
        ray.init(address or "local", **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = f"at {_ADDRESS}={address}" if address else "on this machine"
        reason = str(error).strip().partition("\n")[0]
        raise MachineError(
            f"Ray does not answer {where} ({reason:.200}); 'ray start --head' begins a cluster, "
            f"and without {_ADDRESS} this machine is used"
        ) from None


def _require_answer(address: str) -> None:
    """Raise :class:`OSError` if nothing listens at HOST:PORT, for which Ray waits many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_ANSWER).close()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise missing_extra("ray", "ray") from None
    return ray

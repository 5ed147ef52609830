"""Launch of one process or several, through Lightning Fabric, with their errors and progress."""

import atexit
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from torch import distributed, multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from advmoe_deploy import errors
from advmoe_deploy.errors import (
    AdvMoEError,
    BackendUnavailableError,
    MachineError,
    UsageError,
    file_error,
    machine_error,
)
from advmoe_deploy.progress import Progress, Silent

T = TypeVar("T")
ProcessWork = Callable[[Fabric, Progress], T]
# A key in torchrun's store.
_REFUSED = "advmoe-refused"
_OWN_ERROR = re.compile(r"^advmoe_deploy\.errors\.(\w+): (.+)$", re.MULTILINE)


def launch(work: ProcessWork[T], *, devices: int, precision: str, progress: Progress) -> T:
    """Return what ``work(fabric, progress)`` returns in the first of ``devices`` processes.

    Under torchrun the processes exist already, and their number is torchrun's; otherwise more
    than one are spawned, and ``work`` must be picklable. Accelerators are used where there are
    any, else the CPU.

    Raises:
        UsageError, BackendUnavailableError: as :func:`require_machine`.
        AdvMoEError: what a process raised; a full disk and the like as MachineError.
    """
    require_machine(devices, precision)
    if under_torchrun():
        fabric = _fabric("ddp", int(os.environ["LOCAL_WORLD_SIZE"]), precision)
    else:
        fabric = _fabric("ddp_spawn" if devices > 1 else "auto", devices, precision)
    if under_torchrun():
        _join_torchrun()
    if under_torchrun() or devices == 1:
        fabric.launch()
        return _work(fabric, work, progress)
    with relayed(progress) as relay:
        try:
            result: T = fabric.launch(_work, work, relay)  # type: ignore[arg-type]
        except ProcessRaisedException as error:
            raise _own_error(error) or error from None
        except ProcessExitedException as error:
            raise MachineError(
                f"a process of the training is gone: {error}; where memory ran out, "
                "lower batch_size or raise accumulate, and go on with --resume"
            ) from None
    return result


def require_machine(devices: int, precision: str) -> None:
    """Refuse what this machine cannot launch.

    Raises:
        UsageError: ``devices`` is less than 1.
        BackendUnavailableError: there are fewer accelerators than ``devices``, or none for the
            precision.
    """
    _require_precision(precision)
    if not under_torchrun():
        _require_devices(devices)


def under_torchrun() -> bool:
    """Return whether torchrun has started this process, and the others, already."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def was_restarted() -> bool:
    """Return whether torchrun has started this process in the place of one that failed.

    One in the place of a process that was refused its run was not: it is refused like that one.
    """
    return _attempt() > 0 and not (_agent_has_store() and _store_of_torchrun().check([_REFUSED]))


@contextmanager
def kept_refusal() -> Iterator[None]:
    """Let what is refused in the block at first be refused to the processes of restarts, too."""
    try:
        yield
    except UsageError:
        if _agent_has_store() and _attempt() == 0:
            _store_of_torchrun().set(_REFUSED, "")
        raise


def process_total(devices: int) -> int:
    """Return how many processes will share a batch: torchrun's, or ``devices``."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else devices


def is_first_process() -> bool:
    """Return whether this process prepares what all others use, before they are joined."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def _fabric(strategy: str, devices: int, precision: str) -> Fabric:
    nodes = 1
    if under_torchrun():
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    return Fabric(
        accelerator="auto",
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]
    )


def _join_torchrun() -> None:
    """Join the processes that torchrun has started, before Fabric would.

    torchrun's store outlives a restart, and a process would find in it the address of one that is
    gone; so each attempt has keys of its own. With several nodes attempts are counted by each, and
    it is left to Fabric.
    """
    if not _on_one_node():
        return
    distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=distributed.PrefixStore(f"attempt-{_attempt()}", _store_of_torchrun()),  # type: ignore[attr-defined]
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    atexit.register(distributed.destroy_process_group)


def _attempt() -> int:
    """Return how often torchrun has restarted the processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _agent_has_store() -> bool:
    """Return whether a store outlives the processes, for it is that of torchrun itself."""
    return _on_one_node() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _on_one_node() -> bool:
    """Return whether torchrun has started all processes here, where one store serves them all."""
    return under_torchrun() and os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"]


def _store_of_torchrun() -> Any:
    store, _, _ = next(iter(distributed.rendezvous("env://")))  # type: ignore[attr-defined]
    return store


def _work(fabric: Fabric, work: ProcessWork[T], progress: Progress) -> T:
    try:
        return work(fabric, progress if fabric.is_global_zero else Silent())
    except Exception as error:  # of what ends a process only its text comes back
        known = file_error(error) if isinstance(error, OSError) else machine_error(error)
        if known is None:
            raise
        raise known from error


def _require_devices(devices: int) -> None:
    if devices < 1:
        raise UsageError(f"devices={devices}; the least is 1")
    if torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise BackendUnavailableError(
            f"devices={devices}, but this machine has {torch.cuda.device_count()} GPUs; "
            "lower --devices"
        )


def _require_precision(precision: str) -> None:
    if precision == "16-mixed" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "precision=16-mixed needs a GPU, and here is none; use bf16-mixed or 32-true"
        )


def _own_error(error: ProcessRaisedException) -> AdvMoEError | None:
    """Return the error of ours that a spawned process died of; only its text comes back."""
    matches = _OWN_ERROR.findall(str(error))
    if not matches:
        return None
    name, message = matches[-1]
    kind: type[AdvMoEError] = getattr(errors, name)
    return kind(message)


class _Relay:
    """A progress that crosses the border of a process."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def start(self, task: str, total: int, done: int = 0) -> None:
        self._queue.put(("start", (task, total, done), {}))

    def advance(self, task: str, steps: int = 1, **figures: float) -> None:
        self._queue.put(("advance", (task, steps), figures))

    def finish(self, task: str) -> None:
        self._queue.put(("finish", (task,), {}))

    def note(self, message: str) -> None:
        self._queue.put(("note", (message,), {}))


@contextmanager
def relayed(progress: Progress) -> Iterator[Progress]:
    """Yield a progress for other processes that tells ``progress`` in this one."""
    queue = multiprocessing.get_context("spawn").SimpleQueue()

    def listen() -> None:
        while (message := queue.get()) is not None:
            verb, arguments, figures = message
            getattr(progress, verb)(*arguments, **figures)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield _Relay(queue)
    finally:
        queue.put(None)
        listener.join(timeout=5)
        queue.close()

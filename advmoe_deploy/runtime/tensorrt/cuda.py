"""CUDA through ``cuda-bindings``: memory, streams, events, graphs; no other module knows it.

Works with cuda-bindings 12.9 and 13, whose names are the same. Written against the documented
interface; not run on a GPU yet.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.closing import Closing
from advmoe_deploy.errors import AdvMoEError, BackendUnavailableError, MachineError, missing_extra

_NO_GPU = (
    "cudaErrorNoDevice",
    "cudaErrorInsufficientDriver",
    "cudaErrorInitializationError",
    "cudaErrorDevicesUnavailable",
    "cudaErrorSystemDriverMismatch",
    "cudaErrorCompatNotSupportedOnDevice",
    "cudaErrorNoKernelImageForDevice",
    "cudaErrorUnsupportedPtxVersion",
)
_WAY_OUT = "use a machine with an NVIDIA GPU and its driver, or another --engine"


@dataclass(frozen=True)
class Gpu:
    """The GPU that this process uses, the newest CUDA its driver knows, and its memory."""

    name: str
    compute_capability: tuple[int, int]
    driver: str
    memory_bytes: int


@cache
def gpu() -> Gpu:
    """Return the first GPU that CUDA sees.

    Raises:
        BackendUnavailableError: cuda-bindings, the driver or a GPU is missing.
    """
    cudart = _cudart()
    if check(cudart.cudaGetDeviceCount()) < 1:
        raise BackendUnavailableError(f"CUDA sees no GPU; {_WAY_OUT}")
    facts = check(cudart.cudaGetDeviceProperties(0))
    major = _attribute("cudaDevAttrComputeCapabilityMajor")
    minor = _attribute("cudaDevAttrComputeCapabilityMinor")
    number = check(cudart.cudaDriverGetVersion())
    return Gpu(
        name=_text(facts.name),
        compute_capability=(major, minor),
        driver=f"CUDA {number // 1000}.{number % 1000 // 10}",
        memory_bytes=int(facts.totalGlobalMem),
    )


def wait_for_default_stream() -> None:
    """Let the host wait for what other libraries queued, unless they use streams of their own."""
    cudart = _cudart()
    check(cudart.cudaStreamSynchronize(0))


def check(result: tuple[Any, ...]) -> Any:
    """Return what a call answered behind its error code: nothing, a value or a tuple.

    Raises:
        MachineError: memory is used up, or CUDA failed otherwise.
        BackendUnavailableError: there is no GPU that can be used.
    """
    error, *values = result
    if int(error) != 0:
        raise _failure(error)
    return values[0] if len(values) == 1 else tuple(values) or None


def _failure(error: Any) -> AdvMoEError:
    cudart = _cudart()
    name = getattr(error, "name", str(error))
    _, text = cudart.cudaGetErrorString(error)
    cudart.cudaGetLastError()  # told here, and forgotten: who asks next would take it for its own
    reason = f"{name}: {_text(text)}"
    if name == "cudaErrorMemoryAllocation":
        return MachineError("out of GPU memory; lower the batch size")
    if name in _NO_GPU:
        return BackendUnavailableError(f"no GPU can be used ({reason}); {_WAY_OUT}")
    return MachineError(f"CUDA failed with {reason}; run it again, then look at nvidia-smi")


def _attribute(name: str) -> int:
    cudart = _cudart()
    return int(check(cudart.cudaDeviceGetAttribute(getattr(cudart.cudaDeviceAttr, name), 0)))


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


@cache
def _cudart() -> Any:
    try:
        from cuda.bindings import runtime as cudart
    except ModuleNotFoundError:
        raise missing_extra("cuda-bindings", "gpu", "rtx") from None
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise BackendUnavailableError(
            f"cuda-bindings cannot be loaded: {reason}; {_WAY_OUT}"
        ) from None
    return cudart


class DeviceBuffer(Closing):
    """Memory of the GPU, zero at first."""

    def __init__(self, size: int) -> None:
        cudart = _cudart()
        self.size = max(size, 1)
        # On a stream of its own: to wait for the device would break what another thread captures.
        with Stream() as stream:
            self.address = int(check(cudart.cudaMalloc(self.size)))
            stream.clear(self.address, self.size)
            stream.wait()

    def close(self) -> None:
        """Free it."""
        cudart = _cudart()
        if self.address:
            check(cudart.cudaFree(self.address))
            self.address = 0


class PinnedBuffer(Closing):
    """Memory of the host that the GPU copies from and to without the CPU."""

    def __init__(self, size: int) -> None:
        cudart = _cudart()
        self.size = max(size, 1)
        self.address = int(check(cudart.cudaHostAlloc(self.size, cudart.cudaHostAllocDefault)))

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the buffer's first bytes as an array, which must not outlive it."""
        size = prod(shape) * dtype.itemsize
        buffer = memoryview((ctypes.c_byte * size).from_address(self.address))
        return np.frombuffer(buffer, dtype).reshape(shape)

    def close(self) -> None:
        """Free it."""
        cudart = _cudart()
        if self.address:
            check(cudart.cudaFreeHost(self.address))
            self.address = 0


class Stream(Closing):
    """A queue of the GPU; ``handle`` is what other libraries take for it."""

    def __init__(self) -> None:
        cudart = _cudart()
        self._stream = check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        self.handle = int(self._stream)

    def upload(self, target: int, source: int, size: int) -> None:
        """Queue a copy of ``size`` bytes from pinned memory to the GPU."""
        cudart = _cudart()
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(cudart.cudaMemcpyAsync(target, source, size, kind, self._stream))

    def download(self, target: int, source: int, size: int) -> None:
        """Queue a copy of ``size`` bytes from the GPU to pinned memory."""
        cudart = _cudart()
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(cudart.cudaMemcpyAsync(target, source, size, kind, self._stream))

    def copy(self, target: int, source: int, size: int) -> None:
        """Queue a copy of ``size`` bytes within the GPU."""
        cudart = _cudart()
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        check(cudart.cudaMemcpyAsync(target, source, size, kind, self._stream))

    def clear(self, target: int, size: int) -> None:
        """Queue zeros for ``size`` bytes of the GPU."""
        cudart = _cudart()
        check(cudart.cudaMemsetAsync(target, 0, size, self._stream))

    def wait(self) -> None:
        """Let the host wait until everything queued is done."""
        cudart = _cudart()
        check(cudart.cudaStreamSynchronize(self._stream))

    def wait_for(self, event: "Event") -> None:
        """Queue a wait for ``event``."""
        cudart = _cudart()
        check(cudart.cudaStreamWaitEvent(self._stream, event.raw, 0))

    def captured(self, work: Callable[[], None]) -> "Graph":
        """Return what ``work`` queues on this stream as a graph, without running it."""
        cudart = _cudart()
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(cudart.cudaStreamBeginCapture(self._stream, mode))
        try:
            work()
        except BaseException:
            error, graph = cudart.cudaStreamEndCapture(self._stream)  # it must leave capturing
            if int(error) == 0:
                cudart.cudaGraphDestroy(graph)
            cudart.cudaGetLastError()
            raise
        return Graph(check(cudart.cudaStreamEndCapture(self._stream)))

    def launch(self, graph: "Graph") -> None:
        """Queue a graph."""
        cudart = _cudart()
        check(cudart.cudaGraphLaunch(graph.raw, self._stream))

    def close(self) -> None:
        """Destroy it, once what is queued is done."""
        cudart = _cudart()
        if self.handle:
            check(cudart.cudaStreamDestroy(self._stream))
            self.handle = 0


class Event(Closing):
    """A point in a stream that others can wait for and, ``timed``, that time is taken at."""

    def __init__(self, *, timed: bool = False) -> None:
        cudart = _cudart()
        kind = cudart.cudaEventDefault if timed else cudart.cudaEventDisableTiming
        self.raw = check(cudart.cudaEventCreateWithFlags(kind))

    def record(self, stream: Stream) -> None:
        """Put it behind everything queued on ``stream``."""
        cudart = _cudart()
        check(cudart.cudaEventRecord(self.raw, stream._stream))

    def ms_since(self, earlier: "Event") -> float:
        """Return the milliseconds between two timed events that have happened."""
        cudart = _cudart()
        return float(check(cudart.cudaEventElapsedTime(earlier.raw, self.raw)))

    def close(self) -> None:
        """Destroy it."""
        cudart = _cudart()
        if self.raw is not None:
            check(cudart.cudaEventDestroy(self.raw))
            self.raw = None


class Graph(Closing):
    """Work that is launched as one."""

    def __init__(self, graph: Any) -> None:
        """Instantiate ``graph``, and destroy it."""
        cudart = _cudart()
        try:
            self.raw = check(cudart.cudaGraphInstantiate(graph, 0))
        finally:
            check(cudart.cudaGraphDestroy(graph))

    def close(self) -> None:
        """Destroy it."""
        cudart = _cudart()
        if self.raw is not None:
            check(cudart.cudaGraphExecDestroy(self.raw))
            self.raw = None

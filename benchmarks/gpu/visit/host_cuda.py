"""Stand-in for CUDA's runtime in the memory of the host, by the names of ``cuda-bindings``.

For dry runs and tests where there is no GPU: what is queued is done at once, or kept while its
stream is captured. It proves how we call CUDA, not what CUDA does. ``installed`` lets
``from cuda.bindings import runtime`` find it.
"""

# ruff: noqa: D101, D102, D103, N801, N816 (the names and their meaning are CUDA's)

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class cudaDeviceAttr(IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


cudaHostAllocDefault = 0
cudaStreamNonBlocking = 1
cudaEventDefault = 0
cudaEventDisableTiming = 2
_OK = cudaError_t.cudaSuccess
_INVALID = cudaError_t.cudaErrorInvalidValue
Work = Callable[[], Any]


@dataclass
class Host:
    """What is held, by handle, the calls in order, and the error that was seen last."""

    held: dict[int, Any] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    last_error: cudaError_t = _OK
    # What the next call of this name answers instead, such as a failed capture.
    failing: dict[str, cudaError_t] = field(default_factory=dict)
    _next: int = 1

    def hold(self, thing: Any, handle: int | None = None) -> int:
        self._next += 1
        self.held[handle or self._next] = thing
        return handle or self._next

    def fails(self, name: str) -> cudaError_t:
        self.calls.append(name)
        error = self.failing.pop(name, _OK)
        self.last_error = error or self.last_error
        return error

    def free(self, name: str, handle: int) -> tuple[cudaError_t]:
        self.calls.append(name)
        return (_OK if self.held.pop(int(handle), None) is not None else _INVALID,)


class Stream:
    """Does at once what is queued, unless it is captured."""

    captured: list[Work] | None = None

    def queue(self, work: Work) -> tuple[cudaError_t]:
        if self.captured is None:
            work()
        else:
            self.captured.append(work)
        return (_OK,)


class Recorded(NamedTuple):
    work: list[Work]


HOST = Host()


def _memory(name: str, size: int) -> tuple[cudaError_t, int | None]:
    if error := HOST.fails(name):
        return error, None
    buffer = (ctypes.c_byte * size)(*([7] * min(size, 64)))  # not zero, as memory that was used
    address = ctypes.addressof(buffer)
    return _OK, HOST.hold(buffer, address)


def _queue(stream: int, work: Work) -> tuple[cudaError_t]:
    return HOST.held[int(stream)].queue(work) if stream else (work(), (_OK,))[1]


def cudaMalloc(size: int) -> tuple[cudaError_t, int | None]:
    return _memory("cudaMalloc", size)


def cudaHostAlloc(size: int, flags: int) -> tuple[cudaError_t, int | None]:
    return _memory("cudaHostAlloc", size)


def cudaFree(address: int) -> tuple[cudaError_t]:
    return HOST.free("cudaFree", address)


def cudaFreeHost(address: int) -> tuple[cudaError_t]:
    return HOST.free("cudaFreeHost", address)


def cudaMemcpyAsync(
    target: int, source: int, size: int, kind: cudaMemcpyKind, stream: int
) -> tuple[cudaError_t]:
    if error := HOST.fails("cudaMemcpyAsync"):
        return (error,)
    return _queue(stream, lambda: ctypes.memmove(target, source, size))


def cudaMemsetAsync(target: int, value: int, size: int, stream: int) -> tuple[cudaError_t]:
    HOST.calls.append("cudaMemsetAsync")
    return _queue(stream, lambda: ctypes.memset(target, value, size))


def cudaStreamCreateWithFlags(flags: int) -> tuple[cudaError_t, int]:
    return _OK, HOST.hold(Stream())


def cudaStreamDestroy(stream: int) -> tuple[cudaError_t]:
    return HOST.free("cudaStreamDestroy", stream)


def cudaStreamSynchronize(stream: int) -> tuple[cudaError_t]:
    return (HOST.fails("cudaStreamSynchronize"),)


def cudaStreamWaitEvent(stream: int, event: int, flags: int) -> tuple[cudaError_t]:
    return (_OK,)


def cudaStreamBeginCapture(stream: int, mode: cudaStreamCaptureMode) -> tuple[cudaError_t]:
    HOST.held[int(stream)].captured = []
    return (_OK,)


def cudaStreamEndCapture(stream: int) -> tuple[cudaError_t, int | None]:
    held = HOST.held[int(stream)]
    work, held.captured = held.captured, None
    if error := HOST.fails("cudaStreamEndCapture"):
        return error, None
    return _OK, HOST.hold(Recorded(work))


def cudaGraphInstantiate(graph: int, flags: int) -> tuple[cudaError_t, int | None]:
    if error := HOST.fails("cudaGraphInstantiate"):
        return error, None
    return _OK, HOST.hold(HOST.held[int(graph)])


def cudaGraphLaunch(graph: int, stream: int) -> tuple[cudaError_t]:
    for work in HOST.held[int(graph)].work:
        _queue(stream, work)
    return (_OK,)


def cudaGraphDestroy(graph: int) -> tuple[cudaError_t]:
    return HOST.free("cudaGraphDestroy", graph)


def cudaGraphExecDestroy(graph: int) -> tuple[cudaError_t]:
    return HOST.free("cudaGraphExecDestroy", graph)


def cudaEventCreateWithFlags(flags: int) -> tuple[cudaError_t, int]:
    return _OK, HOST.hold([0.0])


def cudaEventDestroy(event: int) -> tuple[cudaError_t]:
    return HOST.free("cudaEventDestroy", event)


def cudaEventRecord(event: int, stream: int) -> tuple[cudaError_t]:
    moment = HOST.held[int(event)]
    return _queue(stream, lambda: moment.__setitem__(0, time.perf_counter()))


def cudaEventElapsedTime(start: int, end: int) -> tuple[cudaError_t, float]:
    return _OK, 1e3 * (HOST.held[int(end)][0] - HOST.held[int(start)][0])


def cudaGetLastError() -> tuple[cudaError_t]:
    """Return the last error, and forget it."""
    error, HOST.last_error = HOST.last_error, _OK
    return (error,)


def cudaGetErrorString(error: cudaError_t) -> tuple[cudaError_t, bytes]:
    return _OK, b"as the stand-in was told"


def cudaGetDeviceCount() -> tuple[cudaError_t, int]:
    return HOST.fails("cudaGetDeviceCount"), 1


def cudaGetDeviceProperties(device: int) -> tuple[cudaError_t, Any]:
    return _OK, SimpleNamespace(name=b"no GPU, the host's memory", totalGlobalMem=1 << 30)


def cudaDeviceGetAttribute(attribute: cudaDeviceAttr, device: int) -> tuple[cudaError_t, int]:
    return _OK, 0


def cudaDriverGetVersion() -> tuple[cudaError_t, int]:
    return _OK, 0


@contextmanager
def installed() -> Iterator[Host]:
    """Let it be CUDA's runtime until the block ends; afterwards nothing may be held any more."""
    global HOST
    from advmoe_deploy.runtime.tensorrt import cuda

    parent, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.runtime = sys.modules[__name__]  # type: ignore[attr-defined]
    modules = {"cuda": parent, "cuda.bindings": bindings}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    _forget(cuda)
    HOST = Host()
    try:
        yield HOST
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
        _forget(cuda)


def _forget(cuda: ModuleType) -> None:
    """Let it look for CUDA anew."""
    cuda._cudart.cache_clear()
    cuda.gpu.cache_clear()

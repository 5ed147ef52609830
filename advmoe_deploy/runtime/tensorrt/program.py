"""TensorRT engines on this GPU: loaded, refused where they do not fit, bound and queued.

Written against the documented interface, on the names that TensorRT 8.6, 10 and 11 and RTX share;
not run on a GPU yet.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from advmoe_deploy.closing import Closing
from advmoe_deploy.errors import (
    AdvMoEError,
    BackendUnavailableError,
    BundleError,
)
from advmoe_deploy.reports.devices import Device, GpuLibrary, RtxDevice
from advmoe_deploy.runtime.engine import Source, content_of, name_of
from advmoe_deploy.runtime.tensorrt.api import (
    TITLES,
    Heard,
    IExecutionContext,
    listen,
    logger,
    probe,
    tensorrt,
    version_text,
)
from advmoe_deploy.runtime.tensorrt.cuda import DeviceBuffer, Graph, Stream, gpu
from advmoe_deploy.runtime.tensorrt.rtx.kernels import Kernels, kernels_file
from advmoe_deploy.runtime.tensorrt.shapes import narrowest

_LOG = logging.getLogger(__name__)
_TO_LOAD: dict[GpuLibrary, str] = {
    "tensorrt": "on this machine",
    "tensorrt-rtx": "for this GPU, if it is one that RTX compiles for, else with --format trt",
}
# TensorRT's names of the types that NumPy has too.
_NUMPY = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
# The profile that takes all shapes; those that follow are for some of them.
_FIRST_PROFILE = 0


@dataclass(frozen=True)
class Tensor:
    """An input or output: its type on the device, and the least and the largest shape.

    Sizes that follow the batch are -1 in those of an output.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    least: tuple[int, ...]
    is_input: bool


def require_device(device: Device) -> None:
    """Raise if engines built for ``device`` do not run here.

    Raises:
        BackendUnavailableError: this is another GPU or another library, or one is missing.
    """
    here = gpu()
    reason = device.mismatch(
        gpu=here.name,
        compute_capability=here.compute_capability,
        version=version_text(device.library),
    )
    if reason:
        raise BackendUnavailableError(
            f"these engines do not run here: {reason}; export again {_TO_LOAD[device.library]}"
        )


class Program(Closing):
    """One engine, loaded; contexts made of it share its weights."""

    def __init__(self, source: Source, *, device: Device | None = None) -> None:
        """Load an engine.

        Args:
            source: the serialised engine, or its file.
            device: what it was built for, where that is known.

        Raises:
            BackendUnavailableError: TensorRT or a GPU is missing, or is another one.
            BundleError: TensorRT cannot read the engine.
        """
        self._library = device.library if device is not None else "tensorrt"
        trt = tensorrt(self._library)
        gpu()
        if device is not None:
            require_device(device)
        heard = listen()
        self.name = "the engine" if isinstance(source, bytes) else name_of(source)
        runtime = trt.Runtime(logger(self._library))
        if device is not None and device.version_compatible:
            runtime.engine_host_code_allowed = True
        data = content_of(source)
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BundleError(
                f"{TITLES[self._library]} {version_text(self._library)} cannot load {self.name}: "
                f"{heard.reason()}; export it again {_TO_LOAD[self._library]}"
            )
        self._runtime, self._engine = runtime, engine  # the first has to live as long
        self._kernels: Kernels | None = None
        self.can_capture = True
        if isinstance(device, RtxDevice):
            streaming = device.weight_streaming
            self._kernels = Kernels(engine, kernels_file(data), weight_streaming=streaming)
            self.can_capture = not streaming
        self._lock = Lock()
        self.tensors = {name: self._tensor(trt, name) for name in self._names()}
        self._profiles = [
            {name: self._ends(name, number) for name in self.inputs}
            for number in range(engine.num_optimization_profiles)
        ]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The inputs by name, in order."""
        return {name: facts for name, facts in self.tensors.items() if facts.is_input}

    @property
    def outputs(self) -> dict[str, Tensor]:
        """The outputs by name, in order."""
        return {name: facts for name, facts in self.tensors.items() if not facts.is_input}

    @property
    def memory_bytes(self) -> int:
        """Memory that a context needs for the tensors inside."""
        size = probe(self._engine, "device_memory_size_v2")
        return int(probe(self._engine, "device_memory_size") if size is None else size)

    def context(
        self, memory: DeviceBuffer, shapes: Mapping[str, tuple[int, ...]]
    ) -> IExecutionContext:
        """Return a context for inputs of ``shapes``, the tensors inside in ``memory``."""
        context = self._bare_context(narrowest(self._profiles, shapes))
        set_memory = probe(context, "set_device_memory")
        if set_memory is None:  # before TensorRT 10.1
            context.device_memory = memory.address
        else:
            set_memory(memory.address, memory.size)
        return context

    def largest_outputs(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each output where every input is as large as can be."""
        context = self._bare_context(_FIRST_PROFILE)
        for name, facts in self.inputs.items():
            context.set_input_shape(name, facts.shape)
        return {name: tuple(context.get_tensor_shape(name)) for name in self.outputs}

    def _bare_context(self, number: int) -> IExecutionContext:
        """Return a context of this profile, without memory for the tensors inside."""
        trt, heard = tensorrt(self._library), listen()
        engine = self._engine
        strategies = probe(trt, "ExecutionContextAllocationStrategy")
        with self._lock:
            if self._kernels is not None:
                context = self._kernels.context()
            elif strategies is None:  # before TensorRT 10
                context = probe(engine, "create_execution_context_without_device_memory")()
            else:
                context = engine.create_execution_context(strategies.USER_MANAGED)
        if context is None:
            raise BundleError(f"{TITLES[self._library]} cannot run {self.name}: {heard.reason()}")
        # It begins with the first; before TensorRT 10 only an engine's first context does.
        if context.active_optimization_profile != number:
            switch_profile(context, number, self.name, heard)
        return context

    def close(self) -> None:
        """Release the engine, once no context is left."""
        if self._kernels is not None:
            self._kernels.close()
        self._kernels = None
        self._engine = self._runtime = None

    def _names(self) -> list[str]:
        engine = self._engine
        return [str(engine.get_tensor_name(index)) for index in range(engine.num_io_tensors)]

    def _tensor(self, trt: Any, name: str) -> Tensor:
        engine = self._engine
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        least = shape = tuple(engine.get_tensor_shape(name))
        if is_input:
            least, shape = self._ends(name, _FIRST_PROFILE)
        dtype = numpy_type(trt, engine.get_tensor_dtype(name), self.name)
        return Tensor(dtype, shape, least, is_input)

    def _ends(self, name: str, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the least and the largest shape of an input in a profile."""
        engine = self._engine
        least, _, most = map(tuple, engine.get_tensor_profile_shape(name, number))
        return least, most


def switch_profile(context: IExecutionContext, number: int, engine: str, heard: Heard) -> None:
    """Let a new context run kernels of profile ``number``.

    Raises:
        BundleError: TensorRT refuses, which its bindings raise and never return.
    """
    with Stream() as stream:  # not the default one: another execution slot may be capturing
        try:
            context.set_optimization_profile_async(number, stream.handle)
        except RuntimeError:
            raise BundleError(
                f"TensorRT cannot run {engine} by its profile {number}: {heard.reason()}"
            ) from None
        stream.wait()


def numpy_type(trt: Any, kind: Any, owner: str) -> np.dtype[Any]:
    """Return NumPy's type for a type of TensorRT's.

    Raises:
        BundleError: NumPy has no such type.
    """
    for name, dtype in _NUMPY.items():
        if kind == probe(trt.DataType, name):
            return np.dtype(dtype)
    raise BundleError(f"{owner} has an input or output of type {kind}; export it again")


@dataclass(frozen=True)
class TensorPlace:
    """Address of a tensor of one run, and its shape there."""

    address: int
    shape: tuple[int, ...]


class QueuedRuns(Closing):
    """Runs that follow each other, bound to their tensors: queued one by one, then as one graph.

    A graph holds the state of its contexts, so they are this work's own and never bound anew. The
    first time they run uncaptured: only then has TensorRT prepared all it needs.
    """

    def __init__(self, contexts: Sequence[IExecutionContext], *, can_capture: bool = True) -> None:
        """Take over contexts, bound by :func:`bound_context`; a run of some takes memory."""
        self._contexts = list(contexts)
        self._graph: Graph | None = None
        self._runs = 0
        self._can_capture = can_capture

    def start(self, stream: Stream) -> None:
        """Queue it on ``stream``.

        Raises:
            MachineError: CUDA failed.
        """
        self._runs += 1
        if self._runs == 2 and self._can_capture:
            self._capture(stream)
        if self._graph is not None:
            stream.launch(self._graph)
        else:
            self._queue(stream)

    def _capture(self, stream: Stream) -> None:
        try:
            self._graph = stream.captured(lambda: self._queue(stream))
        except AdvMoEError as error:
            self._can_capture = False
            _LOG.warning("runs without a CUDA graph, which is slower: %s", error)

    def _queue(self, stream: Stream) -> None:
        heard = listen()
        for context in self._contexts:
            if not context.execute_async_v3(stream.handle):
                raise BundleError(f"TensorRT cannot run an engine: {heard.reason()}")

    def made(self, run: int, outputs: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Return the shapes that the outputs of the run with this number have."""
        context = self._contexts[run]
        return {name: tuple(context.get_tensor_shape(name)) for name in outputs}

    def close(self) -> None:
        """Release graph and contexts."""
        if self._graph is not None:
            self._graph.close()
        self._graph = None
        self._contexts = []


def bound_context(
    program: Program, memory: DeviceBuffer, places: Mapping[str, TensorPlace]
) -> IExecutionContext:
    """Return a context whose tensors lie at ``places``.

    Raises:
        BundleError: the engine has other inputs and outputs, or does not take these shapes.
    """
    if places.keys() != program.tensors.keys():
        raise BundleError(
            f"{program.name} has {', '.join(program.tensors)}, not {', '.join(places)}; export the "
            "bundle again"
        )
    context = program.context(memory, {name: places[name].shape for name in program.inputs})
    heard = listen()
    for name in program.inputs:
        if not context.set_input_shape(name, places[name].shape):
            raise _misfit(program, name, places[name].shape)
    for name, place in places.items():
        if not context.set_tensor_address(name, place.address):
            raise BundleError(f"TensorRT does not take {name} of {program.name}: {heard.reason()}")
    for name in program.outputs:
        made = tuple(context.get_tensor_shape(name))
        if len(made) != len(places[name].shape) or any(
            size > room for size, room in zip(made, places[name].shape, strict=True)
        ):
            raise _misfit(program, name, made)
    return context


def _misfit(program: Program, name: str, shape: tuple[int, ...]) -> BundleError:
    return BundleError(
        f"{program.name} does not fit its plan: {name} would be of shape {shape}, and it was built "
        f"for up to {program.tensors[name].shape}; export the bundle again"
    )

"""OpenVINO model for one segment or graph, on the CPU; no other module knows OpenVINO."""

from collections.abc import Mapping
from functools import cache
from queue import LifoQueue
from typing import Any

from numpy.typing import NDArray

from advmoe_deploy.closing import Closing
from advmoe_deploy.errors import (
    BackendUnavailableError,
    BundleError,
    MachineError,
    UsageError,
    missing_extra,
)
from advmoe_deploy.process import default_threads, without_telemetry
from advmoe_deploy.runtime.engine import Source, content_of, name_of, require_threads
from advmoe_deploy.specs import ComputeDtype, Precision

# What OpenVINO calls them: the capability a device must list, and the hint for a graph.
_CAPABILITY: dict[Precision, str] = {
    "fp32": "FP32",
    "fp16": "FP16",
    "bf16": "BF16",
    "int8": "INT8",
}
_HINT: dict[ComputeDtype, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_OUT_OF_MEMORY = ("bad_alloc", "bad alloc", "not enough memory", "out of memory")


class OpenVinoEngine(Closing):
    """One ONNX graph, ready to run; safe to call from several threads at once.

    The precision is always said, for left to itself OpenVINO takes bf16 where the CPU has it.
    Threads are not pinned to cores: engines side by side would all be pinned to the first ones.
    """

    def __init__(
        self, model: Source, *, compute_dtype: ComputeDtype = "fp32", threads: int = 0
    ) -> None:
        """Load and compile a graph.

        Args:
            model: the serialised graph, or its file.
            compute_dtype: the precision of everything that is not between Q/DQ pairs.
            threads: of the engine; 0 is :func:`~advmoe_deploy.process.default_threads`.

        Raises:
            BackendUnavailableError: OpenVINO is not installed, or this CPU lacks the precision.
            BundleError: it cannot read the graph.
            MachineError: memory is used up.
            UsageError: ``threads`` is negative.
        """
        require_threads(threads)
        require_precision(compute_dtype)
        core = _core()
        try:
            compiled = core.compile_model(
                core.read_model(content_of(model)),
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": _HINT[compute_dtype],
                    "INFERENCE_NUM_THREADS": threads or default_threads(),
                    "PERFORMANCE_HINT": "LATENCY",
                    "ENABLE_CPU_PINNING": False,
                    "CPU_DENORMALS_OPTIMIZATION": True,
                },
            )
        except (RuntimeError, MemoryError) as error:
            _refuse_out_of_memory(error)
            raise BundleError(f"OpenVINO cannot load {name_of(model)}: {_reason(error)}") from None
        _require_hint(compiled, compute_dtype)
        self.output_names: tuple[str, ...] = tuple(o.get_any_name() for o in compiled.outputs)
        # As many requests as run side by side: more would only hold more memory.
        self._requests: LifoQueue[Any] | None = LifoQueue()
        for _ in range(int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))):
            self._requests.put(compiled.create_infer_request())

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return every output by name.

        Raises:
            BundleError: the graph does not take these inputs.
            MachineError: memory is used up.
            UsageError: the engine is closed.
        """
        requests = self._requests  # another thread may close the engine meanwhile
        if requests is None:
            raise UsageError("the engine is closed; open the bundle again")
        request = requests.get()
        try:
            request.infer(dict(inputs), share_inputs=True, share_outputs=True)  # copied below
            return {name: request.get_tensor(name).data.copy() for name in self.output_names}
        except (RuntimeError, MemoryError) as error:
            _refuse_out_of_memory(error)
            raise BundleError(f"OpenVINO cannot run the graph: {_reason(error)}") from None
        finally:
            requests.put(request)

    def close(self) -> None:
        """Release the requests and with them the compiled graph."""
        self._requests = None


def has_precision(precision: Precision) -> bool:
    """Return whether this CPU computes in ``precision``.

    Raises:
        BackendUnavailableError: OpenVINO is not installed.
    """
    return _CAPABILITY[precision] in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def require_precision(precision: Precision) -> None:
    """Raise :class:`BackendUnavailableError` if OpenVINO or this CPU lacks ``precision``."""
    if not has_precision(precision):
        names = [name for name in _CAPABILITY if has_precision(name)]
        raise BackendUnavailableError(
            f"OpenVINO has no {precision} on this CPU; use {', '.join(names)}, or another machine"
        )


def openvino_version() -> str:
    """Return the version of the installed OpenVINO.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    return str(_openvino().__version__)


@cache
def _core() -> Any:
    return _openvino().Core()


def _openvino() -> Any:
    try:
        with without_telemetry():
            import openvino
    except ImportError:
        raise missing_extra("openvino", "openvino") from None
    return openvino


def _require_hint(compiled: Any, compute_dtype: ComputeDtype) -> None:
    """Refuse a graph that OpenVINO compiled for another precision than asked."""
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if taken != _HINT[compute_dtype]:
        raise BackendUnavailableError(
            f"OpenVINO took {taken} instead of {_HINT[compute_dtype]} on this CPU; choose another "
            "precision"
        )


def _refuse_out_of_memory(error: Exception) -> None:
    if isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
        raise MachineError("out of memory; lower the batch size") from None


def _reason(error: Exception) -> str:
    """Return what OpenVINO says, less where in its own source it says so."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.startswith(_NOISE)), "no reason given")


_NOISE = ("Exception from", "Check '", "FrontEnd API")

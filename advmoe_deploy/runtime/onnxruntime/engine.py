"""ONNX Runtime session for one segment or graph, on the CPU or a GPU; no other module knows it."""

import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from typing import Any, Literal

from numpy.typing import NDArray

from advmoe_deploy.closing import Closing
from advmoe_deploy.errors import (
    BackendUnavailableError,
    BundleError,
    InputError,
    MachineError,
    UsageError,
    missing_extra,
)
from advmoe_deploy.process import default_threads, without_telemetry
from advmoe_deploy.runtime.denormals import flush_denormals
from advmoe_deploy.runtime.engine import Source, content_of, name_of, require_threads
from advmoe_deploy.runtime.onnxruntime.custom_ops import (
    VARIABLE,
    CustomOps,
    find_custom_ops,
    uses_custom_ops,
)
from advmoe_deploy.runtime.onnxruntime.gpu_libraries import load_tensorrt, preload

Provider = Literal["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"]
CPU: Provider = "CPUExecutionProvider"
# Left to itself CUDA rounds fp32 to TF32, and tries every algorithm of every convolution for each
# number of rows that it has not met yet, which an expert's rows seldom are.
_CUDA = ("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"})
_PROVIDERS: dict[Provider, list[Any]] = {
    CPU: [CPU],
    "CUDAExecutionProvider": [_CUDA, CPU],
    "TensorrtExecutionProvider": ["TensorrtExecutionProvider", _CUDA, CPU],
}
# ONNX Runtime has no class of its own for a failed allocation, on no path.
_OUT_OF_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc")
_LOAD_ERRORS = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile")


def rounds_to_tf32(provider: Provider) -> bool:
    """Return whether ``provider`` rounds float32 to TF32; TensorRT's has no option against it."""
    return provider == "TensorrtExecutionProvider" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"


class OrtEngine(Closing):
    """One ONNX graph, ready to run; safe to call from several threads at once.

    Thread pools sleep instead of spinning between runs: side by side in one process, spinning pools
    take the cores from each other and every measured time is wrong.
    """

    def __init__(
        self,
        model: Source,
        *,
        threads: int = 0,
        custom_ops: str | None = None,
        provider: Provider = CPU,
    ) -> None:
        """Load a graph.

        Args:
            model: the serialised graph, or its file.
            threads: inside one operator; 0 is :func:`~advmoe_deploy.process.default_threads`.
            custom_ops: which form of our operators runs, see
                :func:`~advmoe_deploy.runtime.onnxruntime.custom_ops.find_custom_ops`.
            provider: what runs the graph; on a GPU our operators run as bodies, for the kernels
                are the CPU's and every tensor would cross.

        Raises:
            BackendUnavailableError: ONNX Runtime is not installed, or lacks the provider.
            BundleError: it cannot read the graph.
            MachineError: memory is used up.
            UsageError: ``threads`` is negative.
            InputError: the library of the kernels is not the one that was compiled.
        """
        require_threads(threads)
        runtime = _onnxruntime()
        _require_provider(runtime, provider)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or default_threads()
        options.inter_op_num_threads = 1
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        # Its other format may name files too.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        content = content_of(model)
        self.custom_ops: CustomOps | None = None
        if uses_custom_ops(content):
            self.custom_ops = find_custom_ops(custom_ops if provider == CPU else "bodies")
            _register(options, self.custom_ops)
        try:
            # Of a provider that it cannot load it prints at length.
            with nullcontext() if provider == CPU else redirect_stdout(sys.stderr):
                session = runtime.InferenceSession(content, options, providers=_PROVIDERS[provider])
        except Exception as error:
            _refuse_out_of_memory(error)
            if type(error).__name__ not in _LOAD_ERRORS:
                raise
            reason = str(error).splitlines()[0]
            raise BundleError(f"ONNX Runtime cannot load {name_of(model)}: {reason}") from None
        session._model_bytes = None  # which it keeps for good, beside the weights it made of them
        if session.get_providers()[0] != provider:
            raise BackendUnavailableError(
                f"ONNX Runtime cannot load its {provider}: libraries of CUDA, cuDNN or TensorRT "
                "are missing or of another version; 'advmoe doctor' lists what is here"
            )
        session.disable_fallback()  # to the CPU, under the name of the GPU
        self._session: Any = session
        self.output_names: tuple[str, ...] = tuple(o.name for o in session.get_outputs())

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return every output by name.

        Raises:
            MachineError: memory is used up.
            UsageError: the engine is closed.
        """
        session = self._session  # another thread may close the engine meanwhile
        if session is None:
            raise UsageError("the engine is closed; open the bundle again")
        flush_denormals()  # this thread computes too, and the session's option is not for it
        try:
            values = session.run(None, dict(inputs))
        except Exception as error:
            _refuse_out_of_memory(error)
            if type(error).__name__ == "EPFail":  # what CUDA says when it fails
                raise MachineError(f"the GPU failed: {str(error).splitlines()[0]}") from None
            raise
        return dict(zip(self.output_names, values, strict=True))

    def close(self) -> None:
        """Release the session."""
        self._session = None


def _require_provider(runtime: Any, provider: Provider) -> None:
    if provider == CPU:
        return
    if provider not in runtime.get_available_providers():
        raise BackendUnavailableError(
            f"the installed onnxruntime {runtime.__version__} has no {provider}; put another build "
            "in its place: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    preload(runtime)
    if provider == "TensorrtExecutionProvider":
        load_tensorrt(runtime)


def _register(options: Any, custom_ops: CustomOps) -> None:
    """Add the kernels to a session's options, if they are what runs."""
    if custom_ops.loaded is None:
        return
    try:
        options.register_custom_ops_library(custom_ops.loaded)
    except Exception as error:
        if type(error).__name__ not in _LOAD_ERRORS:
            raise
        reason = str(error).splitlines()[0]
        raise InputError(f"the kernels cannot be loaded: {reason}; set {VARIABLE}=bodies") from None


def _refuse_out_of_memory(error: Exception) -> None:
    if any(words in str(error) for words in _OUT_OF_MEMORY):
        raise MachineError("out of memory; lower the batch size") from None


def onnxruntime_version() -> str:
    """Return the version of the installed ONNX Runtime."""
    return str(_onnxruntime().__version__)


def _onnxruntime() -> Any:
    try:
        with without_telemetry():
            import onnxruntime
    except ImportError:
        raise missing_extra("onnxruntime", "cpu") from None
    return onnxruntime

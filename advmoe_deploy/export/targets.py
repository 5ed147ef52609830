"""Targets of an export: backends and precisions that graphs can be written for."""

from dataclasses import dataclass, field
from typing import get_args

from advmoe_deploy.errors import BackendUnavailableError, UsageError
from advmoe_deploy.export.precision.gate import LEAST_ROUTE_AGREEMENT
from advmoe_deploy.reports.devices import GpuLibrary
from advmoe_deploy.runtime.openvino.engine import has_precision, require_precision
from advmoe_deploy.runtime.tensorrt.api import STRONG_TYPES, tensorrt_version, version_text
from advmoe_deploy.runtime.tensorrt.build import BuildOptions, require_buildable
from advmoe_deploy.runtime.tensorrt.device import this_device
from advmoe_deploy.specs import Backend, Precision

# What each backend computes in, ONNX Runtime and OpenVINO on a CPU.
SUPPORTED: dict[Backend, tuple[Precision, ...]] = {
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "fp16", "bf16", "int8"),
    "tensorrt": ("fp32", "fp16", "bf16", "int8"),
    "tensorrt-rtx": ("fp32", "fp16", "bf16", "int8"),
}


@dataclass(frozen=True)
class Target:
    """A backend and a precision to write graphs for.

    TensorRT's engines are built as ``build`` says, on this machine unless ``onnx_only``: then the
    graphs are written, and a script that builds them elsewhere. RTX's are compiled anywhere. A
    router is lowered if at least ``least_route_agreement`` of its clear routes stay the same.
    """

    backend: Backend
    precision: Precision
    onnx_only: bool = False
    build: BuildOptions = field(default_factory=BuildOptions)
    least_route_agreement: float = LEAST_ROUTE_AGREEMENT

    @property
    def is_exact(self) -> bool:
        """True if it computes in float32, and rounds it nowhere."""
        return self.precision == "fp32" and not self.tf32

    @property
    def tf32(self) -> bool:
        """True if float32 is rounded to TF32; where graphs are written, none is yet."""
        return self.build.tf32 and not self.onnx_only

    @property
    def runs_on(self) -> Backend:
        """Backend that runs it; graphs that engines are still to be built of run in ONNX's."""
        return "onnxruntime" if self.onnx_only else self.backend

    @property
    def folder(self) -> str:
        """Folder of theirs in the bundle; engines are told apart by their device, too."""
        return f"engines/{self.backend}-{self.precision}"


# The graphs that every bundle has.
PORTABLE = Target("onnxruntime", "fp32")


def require_supported(target: Target) -> None:
    """Raise if no machine, or not this one, runs ``target``.

    Raises:
        UsageError: the backend never computes in that precision.
        BackendUnavailableError: the backend is not installed, or this CPU lacks the precision, or
            there is no GPU to build engines for.
    """
    supported = SUPPORTED[target.backend]
    if target.precision not in supported:
        raise UsageError(
            f"{target.backend} does not compute in {target.precision} on a CPU; it does in "
            f"{', '.join(supported)}, so choose another --precision or --format"
        )
    if target.backend == "openvino":
        require_precision(target.precision)
    if target.backend == "tensorrt-rtx":
        require_buildable(target.precision, target.build, "tensorrt-rtx")
    if target.backend == "tensorrt" and not target.onnx_only:
        try:
            require_gpu(target.precision, target.build)
            _require_unquantised_dtype(target)
        except BackendUnavailableError as error:
            raise BackendUnavailableError(
                f"{error}; or pass --onnx-only, which writes graphs that another machine builds"
            ) from None


def _require_unquantised_dtype(target: Target) -> None:
    if target.build.unquantised_dtype != "fp32" and tensorrt_version() < STRONG_TYPES:
        raise BackendUnavailableError(
            f"TensorRT {version_text()} has no Q/DQ pairs of {target.build.unquantised_dtype}, as "
            "10 does; leave out unquantised_dtype"
        )


def require_gpu(precision: Precision, build: BuildOptions) -> None:
    """Raise :class:`BackendUnavailableError` unless engines can be built here."""
    try:
        this_device()
        require_buildable(precision, build)
    except BackendUnavailableError as error:
        raise BackendUnavailableError(
            f"engines are built where they run, and here {error}; --format trt-rtx compiles "
            "engines for GeForce and RTX GPUs without one"
        ) from None


def fallback_order(target: Target) -> tuple[Precision, ...]:
    """Return the precisions that a segment of ``target`` may be raised through, up to fp32."""
    if target.precision == "int8" and target.backend == "openvino" and has_precision("bf16"):
        return ("int8", "bf16", "fp32")
    if target.precision == "int8" and target.backend in get_args(GpuLibrary):
        return ("int8", "fp16", "fp32")
    return (target.precision, "fp32")

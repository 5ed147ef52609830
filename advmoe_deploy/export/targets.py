"""Backends and precisions that graphs can be written for."""

from dataclasses import dataclass

from advmoe_deploy.errors import UsageError
from advmoe_deploy.runtime.openvino_engine import has_precision, require_precision
from advmoe_deploy.specs import Backend, Precision

# What each backend computes in on a CPU.
SUPPORTED: dict[Backend, tuple[Precision, ...]] = {
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "fp16", "bf16", "int8"),
}


@dataclass(frozen=True)
class Target:
    """A backend and a precision to write graphs for."""

    backend: Backend
    precision: Precision

    @property
    def folder(self) -> str:
        """Where in the bundle they go."""
        return f"engines/{self.backend}-{self.precision}"


def require_supported(target: Target) -> None:
    """Raise if no machine, or not this one, runs ``target``.

    Raises:
        UsageError: the backend never computes in that precision.
        BackendUnavailableError: the backend is not installed, or this CPU lacks the precision.
    """
    supported = SUPPORTED[target.backend]
    if target.precision not in supported:
        raise UsageError(
            f"{target.backend} does not compute in {target.precision} on a CPU; it does in "
            f"{', '.join(supported)}, so choose another --precision or --format"
        )
    if target.backend == "openvino":
        require_precision(target.precision)


def ladder(target: Target) -> tuple[Precision, ...]:
    """Return the precisions that a segment of ``target`` may be raised through, up to fp32."""
    if target.precision == "int8" and target.backend == "openvino" and has_precision("bf16"):
        return ("int8", "bf16", "fp32")
    return (target.precision, "fp32")

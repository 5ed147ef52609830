"""Request of an export: format, precisions and build options, refused where they do not fit."""

from collections.abc import Mapping, Sequence
from typing import get_args

from advmoe_deploy.bundle import FORMATS
from advmoe_deploy.errors import UsageError, unknown_name
from advmoe_deploy.export.precision.gate import LEAST_ROUTE_AGREEMENT
from advmoe_deploy.export.targets import Target
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.specs import Precision

_FOR_RTX = "it is for trt-rtx"
_OF_RTX = {"compute_capabilities": _FOR_RTX, "weight_streaming": _FOR_RTX}
_IN_VAIN = "kernels are chosen where the engine runs, so it would change nothing"
# Why each of TensorRT's options is none for RTX.
_NOT_OF_RTX = {
    "batch_min_profile": _IN_VAIN,
    "optimization_level": _IN_VAIN,
    "refittable": "this is compiled only where a GPU is",
    "tactic_sources": _IN_VAIN,
    "tf32": "what it rounds can only be examined on the GPU",
    "timing_cache": _IN_VAIN,
    "version_compatible": "its engines run with one release alone",
}


def targets_of(
    name: str,
    precisions: Sequence[Precision],
    build: BuildOptions,
    *,
    onnx_only: bool,
    least_route_agreement: float | None = None,
) -> list[Target]:
    """Return the targets of the format called ``name``, each precision once, by default fp32.

    Raises:
        UsageError: a name is unknown, or options do not go together.
    """
    backends = {format_: backend for backend, format_ in FORMATS.items()}
    if name not in backends:
        raise unknown_name("format", name, backends)
    for precision in precisions:
        if precision not in get_args(Precision):
            raise unknown_name("precision", precision, get_args(Precision))
    if name != "trt" and onnx_only:
        raise UsageError(f"--onnx-only goes with --format trt, not {name}")
    _require_options(name, build)
    if build.unquantised_dtype != "fp32" and "int8" not in precisions:
        raise UsageError("unquantised_dtype goes with --precision int8")
    wanted = dict.fromkeys(precisions or ("fp32",))
    least = LEAST_ROUTE_AGREEMENT if least_route_agreement is None else least_route_agreement
    return [Target(backends[name], precision, onnx_only, build, least) for precision in wanted]


def _require_options(name: str, build: BuildOptions) -> None:
    changed = {key for key, value in BuildOptions() if getattr(build, key) != value}
    if changed and name not in ("trt", "trt-rtx"):
        raise UsageError(f"build options go with --format trt or trt-rtx, not {name}")
    others = _NOT_OF_RTX if name == "trt-rtx" else _OF_RTX
    if refused := sorted(changed & others.keys()):
        raise UsageError(f"--format {name} takes no {refused[0]}: {others[refused[0]]}")


def require_bundle_request(name: str, options: Mapping[str, object]) -> None:
    """Refuse what cannot be made of a bundle: other formats than NVIDIA's, a run's ``options``.

    Raises:
        UsageError: it is asked for.
    """
    if name not in ("trt", "trt-rtx"):
        raise UsageError(
            "this is a bundle, and only engines of --format trt and trt-rtx are built of one; for "
            f"{name} name the run"
        )
    if asked := [option for option, value in options.items() if value]:
        raise UsageError(f"{', '.join(asked)} goes with a run, and this is a bundle; leave it out")

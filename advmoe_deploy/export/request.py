"""Request of an export: format, precisions and build options, refused where they do not fit."""

from collections.abc import Mapping, Sequence
from typing import get_args

from advmoe_deploy.errors import UsageError, unknown_name
from advmoe_deploy.export.targets import Target
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.specs import FORMATS, Precision


def targets_of(
    name: str, precisions: Sequence[Precision], build: BuildOptions, *, onnx_only: bool
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
    if name != "trt" and (onnx_only or build != BuildOptions()):
        raise UsageError(f"--onnx-only and build options go with --format trt, not {name}")
    if build.unquantised_dtype != "fp32" and "int8" not in precisions:
        raise UsageError("unquantised_dtype goes with --format trt --precision int8")
    wanted = dict.fromkeys(precisions or ("fp32",))
    return [Target(backends[name], precision, onnx_only, build) for precision in wanted]


def require_bundle_request(name: str, options: Mapping[str, object]) -> None:
    """Refuse what cannot be made of a bundle: another format than ``trt``, and a run's ``options``.

    Raises:
        UsageError: it is asked for.
    """
    if name != "trt":
        raise UsageError(
            f"this is a bundle, and only engines of --format trt are built of one; for {name} name "
            "the run"
        )
    if asked := [option for option, value in options.items() if value]:
        raise UsageError(f"{', '.join(asked)} goes with a run, and this is a bundle; leave it out")

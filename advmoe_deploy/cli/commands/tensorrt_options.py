"""Options of ``export --format trt``, and what they come to."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import typer
from pydantic import ValidationError

from advmoe_deploy.cli.options import names
from advmoe_deploy.errors import UsageError, unknown_name
from advmoe_deploy.runtime.tensorrt.build import TACTIC_SOURCES, BuildOptions
from advmoe_deploy.specs import Arithmetic, BatchProfile, Precision, one_line

_SIZES = BatchProfile()

OnnxOnly = Annotated[
    bool,
    typer.Option(
        "--onnx-only",
        help="trt: write graphs and a script that build the engines on another machine.",
    ),
]
Tf32 = Annotated[bool, typer.Option("--tf32", help="trt: let fp32 be rounded to TF32.")]
WorkspaceMib = Annotated[
    int | None,
    typer.Option("--workspace-mib", min=1, help="trt: memory for a kernel's scratch."),
]
OptimizationLevel = Annotated[
    int | None,
    typer.Option(
        "--optimization-level",
        min=0,
        max=5,
        help="trt: how long to search for kernels.",
    ),
]
VersionCompatible = Annotated[
    bool,
    typer.Option(
        "--version-compatible",
        help="trt: run on later releases of this major version as well.",
    ),
]
Refittable = Annotated[
    bool,
    typer.Option("--refittable", help="trt: weights can be changed later."),
]
TacticSources = Annotated[
    str | None,
    typer.Option(
        "--tactic-sources",
        metavar="NAME,...",
        help="trt: libraries whose kernels may be tried; by default all.",
    ),
]
AroundInt8 = Annotated[
    str,
    typer.Option(
        "--around-int8",
        metavar="P",
        help="trt: fp32 or fp16, for what int8 leaves unquantised; fp16 needs TensorRT 10.",
    ),
]
BatchMin = Annotated[
    int | None,
    typer.Option("--batch-min", min=1, help=f"trt: least batch; {_SIZES.min}."),
]
BatchOpt = Annotated[
    int | None,
    typer.Option(
        "--batch-opt",
        min=1,
        help=f"trt: batch to be fastest at; {_SIZES.opt}, or the nearest between the others.",
    ),
]
BatchMax = Annotated[
    int | None,
    typer.Option("--batch-max", min=1, help=f"trt: largest batch; {_SIZES.max}."),
]
BatchMinProfile = Annotated[
    bool,
    typer.Option(
        "--batch-min-profile/--no-batch-min-profile",
        help="trt: choose kernels for exactly the least batch, and for one row, as well.",
    ),
]


def batch_profile(least: int | None, best: int | None, largest: int | None) -> BatchProfile:
    """Return the batch sizes; what is not given follows from what is.

    Raises:
        UsageError: they do not grow.
    """
    low = least or min(_SIZES.min, best or _SIZES.min)
    high = largest or max(_SIZES.max, best or 1, low)
    middle = best or min(max(_SIZES.opt, low), high)
    try:
        return BatchProfile(min=low, opt=middle, max=high)
    except ValidationError as error:
        raise UsageError(one_line(error)) from None


def require_for_trt(to: str, options: BuildOptions, *, onnx_only: bool) -> None:
    """Raise :class:`UsageError` if options of TensorRT are given with another format."""
    if to != "trt" and (onnx_only or options != BuildOptions()):
        raise UsageError(
            f"batch sizes, --onnx-only and how to build engines go with --format trt, not {to}"
        )


def around_int8(name: str, precisions: Sequence[Precision], to: str) -> Arithmetic:
    """Return what is computed in around int8.

    Raises:
        UsageError: it is neither fp32 nor fp16, or there is no int8 that it is around of.
    """
    if name == "fp32":
        return "fp32"
    if name != "fp16":
        raise unknown_name("precision around int8", name, ("fp32", "fp16"))
    if to != "trt" or "int8" not in precisions:
        raise UsageError("--around-int8 goes with --format trt --precision int8")
    return "fp16"


def require_for_bundle(to: str, given: Mapping[str, object]) -> None:
    """Raise :class:`UsageError` if a bundle cannot be exported so; ``given`` are options of runs.

    Raises:
        UsageError: it is not to be built by TensorRT, or an option asks for something of a run.
    """
    if to != "trt":
        raise UsageError(
            f"this is a bundle, and only engines of --format trt are built of one; for {to} name "
            "the run"
        )
    if asked := [option for option, value in given.items() if value]:
        raise UsageError(f"{', '.join(asked)} goes with a run, and this is a bundle; leave it out")


def sources(text: str | None) -> tuple[str, ...] | None:
    """Return the names in a list such as ``JIT_CONVOLUTIONS,EDGE_MASK_CONVOLUTIONS``.

    Raises:
        UsageError: no release of TensorRT knows one of them.
    """
    if text is None:
        return None
    for name in names(text):
        if name not in TACTIC_SOURCES:
            raise unknown_name("tactic source", name, TACTIC_SOURCES)
    return names(text)

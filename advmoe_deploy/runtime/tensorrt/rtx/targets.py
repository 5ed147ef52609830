"""Builds of TensorRT for RTX: for which kinds of GPUs, and where their weights may stay."""

from collections.abc import Sequence
from typing import Any

from advmoe_deploy.errors import BackendUnavailableError
from advmoe_deploy.reports.devices import parse_capability
from advmoe_deploy.runtime.tensorrt.api import IBuilderConfig, probe, tensorrt


def configure(
    config: IBuilderConfig, capabilities: Sequence[str], *, weight_streaming: bool
) -> None:
    """Set what a build is for.

    Raises:
        BackendUnavailableError: it compiles for no such compute capability.
    """
    trt = tensorrt("tensorrt-rtx")
    # A run that may take memory cannot be captured as a CUDA graph; streamed weights take some.
    flags = trt.BuilderFlag
    config.set_flag(flags.WEIGHT_STREAMING if weight_streaming else flags.REQUIRE_USER_ALLOCATION)
    wanted = chosen(capabilities)
    if wanted:
        config.num_compute_capabilities = len(wanted)
    for index, (target, name) in enumerate(zip(wanted, capabilities, strict=True)):
        if not config.set_compute_capability(target, index):
            raise BackendUnavailableError(f"TensorRT for RTX does not compile for {name} here")


def chosen(capabilities: Sequence[str]) -> list[Any]:
    """Return the library's own names of compute capabilities such as ``8.6``.

    Raises:
        BackendUnavailableError: it has none for one of them.
    """
    trt = tensorrt("tensorrt-rtx")
    names = ["SM{}{}".format(*parse_capability(each)) for each in capabilities]
    found = [probe(trt.ComputeCapability, name) for name in names]
    if None in found:
        known = [name[2:] for name in dir(trt.ComputeCapability) if name.startswith("SM")]
        dotted = ", ".join(sorted((f"{name[:-1]}.{name[-1]}" for name in known), key=float))
        raise BackendUnavailableError(
            f"TensorRT for RTX compiles for compute capability {dotted}, not "
            f"{capabilities[found.index(None)]}"
        )
    return found

"""Device records: what engines that are built here are tied to."""

from advmoe_deploy.reports.devices import EngineDevice, RtxDevice, parse_capability
from advmoe_deploy.runtime.tensorrt.api import version_text
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.runtime.tensorrt.cuda import gpu


def this_device(*, version_compatible: bool = False, tf32: bool = False) -> EngineDevice:
    """Return what engines that are built here are tied to.

    Raises:
        BackendUnavailableError: TensorRT, a driver or a GPU is missing.
    """
    version = version_text()
    found = gpu()
    return EngineDevice(
        gpu=found.name,
        compute_capability=found.compute_capability,
        tensorrt=version,
        version_compatible=version_compatible,
        tf32=tf32,
    )


def rtx_device(options: BuildOptions) -> RtxDevice:
    """Return what engines that TensorRT for RTX compiles here are tied to; it needs no GPU.

    Raises:
        BackendUnavailableError: TensorRT for RTX is missing.
    """
    return RtxDevice(
        tensorrt_rtx=version_text("tensorrt-rtx"),
        compute_capabilities=tuple(map(parse_capability, options.compute_capabilities)),
        weight_streaming=options.weight_streaming,
    )

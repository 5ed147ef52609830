"""Device record of this machine, the GPU and TensorRT that engines are tied to."""

from advmoe_deploy.bundle import EngineDevice
from advmoe_deploy.runtime.tensorrt.api import version_text
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

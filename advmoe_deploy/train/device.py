"""Device that a training will run on, told without loading PyTorch."""

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from advmoe_deploy.errors import missing_extra


def require_torch() -> None:
    """Say that PyTorch is missing before data are read for nothing.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    if not find_spec("torch"):
        raise missing_extra("torch", "train")


def has_gpu() -> bool:
    """Return whether there is an NVIDIA GPU, and a PyTorch that was built for one."""
    gpus = Path("/proc/driver/nvidia/gpus")
    try:
        return not metadata.version("torch").endswith("+cpu") and any(gpus.iterdir())
    except (OSError, metadata.PackageNotFoundError):
        return False


def has_bf16() -> bool:
    """Return whether the device computes in bfloat16: a GPU, or a CPU with AVX-512 BF16 or AMX."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        flags = []
    return has_gpu() or bool({"avx512_bf16", "amx_bf16"} & {*flags})

"""Diagnosis of the way to an NVIDIA GPU: each part that it needs, present or missing."""

import ctypes
from dataclasses import dataclass

from advmoe_deploy.errors import AdvMoEError, BackendUnavailableError, install_line
from advmoe_deploy.reports.devices import GpuLibrary
from advmoe_deploy.reports.versions import version_of
from advmoe_deploy.runtime.tensorrt.api import parse_version, version_text
from advmoe_deploy.runtime.tensorrt.cuda import gpu

# Of cuDNN: what ONNX Runtime's GPU package is linked to since 1.19.
_CUDNN_MAJOR = 9
_BY_HAND = "no pip package of ours brings it"


@dataclass(frozen=True)
class Requirement:
    """One thing that is needed: what was found of it, else ``None`` and what brings it."""

    found: str | None
    missing: str | None = None


def gpu_path() -> dict[str, Requirement]:
    """Return by name everything between this program and a GPU; absence is no error."""
    return {
        "NVIDIA driver": _driver(),
        "GPU": _gpu(),
        "CUDA for Python": _package("cuda-bindings", "gpu"),
        "TensorRT": _library("tensorrt"),
        "TensorRT for RTX, which compiles without a GPU": _library("tensorrt-rtx"),
        "onnxruntime-gpu": _package("onnxruntime-gpu", "cuda"),
        "cuDNN, which it needs": _cudnn(),
    }


def _driver() -> Requirement:
    """Return the newest CUDA that the driver speaks."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Requirement(None, f"install NVIDIA's driver; {_BY_HAND}")
    version = ctypes.c_int()
    ask = getattr(library, "cuDriverGetVersion", None)  # a stub, or what is left of a driver
    if ask is None or ask(ctypes.byref(version)) != 0:
        return Requirement(None, "a driver is there and does not answer; restart the machine")
    return Requirement(f"for CUDA up to {version.value // 1000}.{version.value % 1000 // 10}")


def _gpu() -> Requirement:
    try:
        found = gpu()
    except AdvMoEError as error:  # whatever a broken driver answers
        return Requirement(None, str(error))
    major, minor = found.compute_capability
    return Requirement(f"{found.name}, compute capability {major}.{minor}")


def _library(library: GpuLibrary) -> Requirement:
    try:
        return Requirement(version_text(library))
    except BackendUnavailableError as error:
        return Requirement(None, str(error))


def _cudnn() -> Requirement:
    for package in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        version = version_of(package)
        if version and parse_version(version)[0] == _CUDNN_MAJOR:
            return Requirement(f"{version} ({package})")
    name = f"libcudnn.so.{_CUDNN_MAJOR}"
    try:
        ctypes.CDLL(name)
    except OSError:
        return Requirement(
            None, f"{install_line('cuda')}, or NVIDIA's own package of cuDNN {_CUDNN_MAJOR}"
        )
    return Requirement(name)


def _package(name: str, extra: str) -> Requirement:
    version = version_of(name)
    return Requirement(version) if version else Requirement(None, install_line(extra))

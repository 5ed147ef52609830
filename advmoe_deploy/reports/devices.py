"""Records of what engines are tied to: one GPU and a TensorRT, or kinds of GPUs and an RTX."""

import re
from typing import ClassVar, Literal, TypeAlias

from advmoe_deploy.specs import Frozen

# The backends of NVIDIA, whose engines are files of its own.
GpuLibrary = Literal["tensorrt", "tensorrt-rtx"]

# Compute capability, as CUDA counts generations of GPUs: (8, 6) is 8.6.
Capability: TypeAlias = tuple[int, int]


# Where TensorRT for RTX is told nothing: these, and all from the last on. 9.0 is none of them.
_RTX_KINDS: tuple[Capability, ...] = ((8, 0), (8, 6), (8, 9), (12, 0))


class EngineDevice(Frozen):
    """The GPU and the TensorRT that engines were built for: they run on no other.

    ``tensorrt`` is the version in full. Version-compatible engines also run on later releases of
    the same major version. With ``tf32``, fp32 is rounded to TF32 where that is faster.
    """

    library: ClassVar[GpuLibrary] = "tensorrt"
    gpu: str
    compute_capability: Capability
    tensorrt: str
    version_compatible: bool = False
    tf32: bool = False

    @property
    def version(self) -> str:
        """The version of the library."""
        return self.tensorrt

    @property
    def slug(self) -> str:
        """The device in the name of a folder: ``nvidia-h100-pcie-sm90-10.16.1``."""
        major, minor = self.compute_capability
        gpu = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        return f"{gpu}-sm{major}{minor}-{_release(self.tensorrt)}"

    @property
    def description(self) -> str:
        """The device for people."""
        return f"{_on(self.gpu, self.compute_capability)}, TensorRT {self.tensorrt}"

    def mismatch(self, *, gpu: str, compute_capability: Capability, version: str) -> str:
        """Return why engines of this device do not run on that one; nothing if they do."""
        there = gpu, compute_capability
        if (self.gpu, self.compute_capability) != there:
            return f"built on {_on(self.gpu, self.compute_capability)}, this is {_on(*there)}"
        if self._runs_with(version):
            return ""
        later = " or later releases of that major version" if self.version_compatible else ""
        return f"built with TensorRT {self.tensorrt}{later}, here is {version}"

    def _runs_with(self, tensorrt: str) -> bool:
        built, here = _numbers(self.tensorrt), _numbers(tensorrt)
        later = self.version_compatible and built[:1] == here[:1] and built <= here
        return self.tensorrt == tensorrt or later


class RtxDevice(Frozen):
    """The GPUs that engines were compiled for, wherever that was, by TensorRT for RTX.

    ``tensorrt_rtx`` is its version in full; no other loads them. Without ``compute_capabilities``
    they are those that it chooses: 8.0, 8.6, 8.9, 12.0 and newer. With ``weight_streaming`` weights
    may stay in the host's memory, as far as those of the GPU do not suffice.

    Source: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html
    """

    library: ClassVar[GpuLibrary] = "tensorrt-rtx"
    version_compatible: ClassVar[bool] = False
    tf32: ClassVar[bool] = False
    tensorrt_rtx: str
    compute_capabilities: tuple[Capability, ...] = ()
    weight_streaming: bool = False

    @property
    def version(self) -> str:
        """The version of the library."""
        return self.tensorrt_rtx

    @property
    def slug(self) -> str:
        """The device in the name of a folder: ``sm86-sm89-1.7.1``."""
        kinds = [f"sm{major}{minor}" for major, minor in self.compute_capabilities]
        return f"{'-'.join(kinds) or 'sm80-and-newer'}-{_release(self.tensorrt_rtx)}"

    @property
    def description(self) -> str:
        """The device for people."""
        return f"GPUs of compute capability {self._kinds}, TensorRT for RTX {self.tensorrt_rtx}"

    @property
    def _kinds(self) -> str:
        named = ", ".join(map(_dotted, self.compute_capabilities or _RTX_KINDS))
        return named if self.compute_capabilities else f"{named} and newer"

    def _is_for(self, capability: Capability) -> bool:
        if self.compute_capabilities:
            return capability in self.compute_capabilities
        return capability in _RTX_KINDS or capability > _RTX_KINDS[-1]

    def mismatch(self, *, gpu: str, compute_capability: Capability, version: str) -> str:
        """Return why engines of this device do not run on that one; nothing if they do."""
        if not self._is_for(compute_capability):
            return (
                f"compiled for compute capability {self._kinds}, this is "
                f"{_on(gpu, compute_capability)}"
            )
        if version != self.tensorrt_rtx:
            return f"compiled with TensorRT for RTX {self.tensorrt_rtx}, here is {version}"
        return ""


Device: TypeAlias = EngineDevice | RtxDevice


def parse_capability(text: str) -> Capability:
    """Return the numbers of ``8.6``."""
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def _on(gpu: str, compute_capability: Capability) -> str:
    return f"{gpu} (compute capability {_dotted(compute_capability)})"


def _dotted(capability: Capability) -> str:
    return "{}.{}".format(*capability)


def _release(version: str) -> str:
    return ".".join(version.split(".")[:3])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))

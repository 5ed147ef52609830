"""Libraries that ONNX Runtime's providers for GPUs need, loaded from wheels wherever these lie."""

import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from advmoe_deploy.errors import BackendUnavailableError
from advmoe_deploy.runtime.shared_libraries import load_library, package_folders

# As the provider's own library names them.
_TENSORRT = re.compile(rb"libnv(?:infer|infer_plugin|onnxparser)\.so\.\d+")


def preload(runtime: Any) -> None:
    """Load CUDA and cuDNN for the module ``runtime``, where it knows how to.

    Left to itself it looks beside itself alone: not where ``pip install --target``, a second site
    or PyTorch's installation put NVIDIA's wheels.
    """
    load = getattr(runtime, "preload_dlls", None)
    if load is None:  # before 1.21
        return
    for folder in nvidia_folders():
        with redirect_stdout(StringIO()):  # of each it says what the others have
            load(directory=str(folder))
    with redirect_stdout(sys.stderr):
        load()


def load_tensorrt(runtime: Any) -> None:
    """Load the TensorRT that the module ``runtime`` was linked to, from its wheel or the system.

    Raises:
        BackendUnavailableError: it is not here, or another release is.
    """
    library = Path(runtime.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    wanted = set(_TENSORRT.findall(library.read_bytes())) if library.is_file() else set()
    for name in sorted(each.decode() for each in wanted):  # the first does not need the others
        if not load_library(name, "tensorrt_libs"):
            major = name.rpartition(".")[2]
            raise BackendUnavailableError(
                f"onnxruntime {runtime.__version__} was linked to TensorRT {major}, and no {name} "
                f"can be loaded; run: pip install 'tensorrt>={major},<{int(major) + 1}'"
            )


def nvidia_folders() -> Iterator[Path]:
    """Yield the folders of libraries in NVIDIA's wheels, from all that Python imports from."""
    for root in package_folders("nvidia"):
        yield from sorted(root.glob("*/lib"))

"""Libraries that ONNX Runtime's providers for GPUs need, loaded from wheels wherever these lie."""

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any


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


def nvidia_folders() -> Iterator[Path]:
    """Yield the folders of libraries in NVIDIA's wheels, from all that Python imports from."""
    spec = find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(root).glob("*/lib"))

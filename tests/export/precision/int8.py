"""The targets in int8, and a gate that lets everything pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from advmoe_deploy.bundle import Bundle, EngineSet
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.export.precision import gate
from advmoe_deploy.export.targets import Target

TARGETS = (
    Target("openvino", "int8"),
    Target("onnxruntime", "int8"),
    Target("tensorrt", "int8", onnx_only=True),
)
IMAGES = to_float(load_dataset("digits").test.images[:40])


@contextmanager
def any_drop() -> Iterator[None]:
    """Let every drop in accuracy pass: the images that int8 loses differ by CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "MAX_DROP", 100.0)
        yield


def engines_of(bundle: Bundle, backend: str) -> EngineSet:
    return next(each for each in bundle.manifest.engines if each.backend == backend)

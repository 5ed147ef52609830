"""Engines that need a GPU say in one line what is missing."""

import subprocess
import sys

import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import BackendUnavailableError, BundleError
from advmoe_deploy.runtime.ort_engine import OrtEngine
from advmoe_deploy.runtime.select import ENGINES, ON_GPU, backend_of, open_runner


def has_provider(name: str) -> bool:
    import onnxruntime

    return name in onnxruntime.get_available_providers()


@pytest.mark.parametrize(
    ("engine", "provider"),
    [
        ("onnxruntime-cuda", "CUDAExecutionProvider"),
        ("onnxruntime-trt", "TensorrtExecutionProvider"),
    ],
)
def test_a_provider_that_the_build_lacks(tiny_bundle: Bundle, engine: str, provider: str) -> None:
    if has_provider(provider):
        pytest.skip(f"this onnxruntime has {provider}")
    with pytest.raises(
        BackendUnavailableError, match=rf"has no {provider}; .*onnxruntime-gpu"
    ) as e:
        open_runner(tiny_bundle, engine)
    assert "\n" not in str(e.value)
    command = ["profile", str(tiny_bundle.path), "--engine", engine, "--batch", "1"]
    assert run(command) == 4


def test_the_cpu_provider_is_the_default(tiny_bundle: Bundle) -> None:
    with OrtEngine(tiny_bundle.file("model.onnx")) as engine:
        answer = engine.run({"images": np.zeros((1, 1, 8, 8), np.float32)})
    assert answer["logits"].shape == (1, 10)


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-at-once", "tensorrt:fp16"])
def test_a_bundle_without_engines_for_a_gpu(tiny_bundle: Bundle, engine: str) -> None:
    with pytest.raises(BundleError, match=r"not exported for tensorrt.*--format trt"):
        open_runner(tiny_bundle, engine)


def test_every_engine_belongs_to_a_backend() -> None:
    backends = {name: backend_of(name) for name in ENGINES}
    assert backends["onnxruntime-trt"] == backends["onnxruntime-plan"] == "onnxruntime"
    assert backends["tensorrt-at-once"] == backends["tensorrt"] == "tensorrt"
    assert set(ON_GPU) < set(ENGINES)


def test_without_cuda_bindings_its_extra_is_named() -> None:
    program = """
import sys
sys.modules["cuda"] = None
from advmoe_deploy.errors import BackendUnavailableError
from advmoe_deploy.runtime.cuda import gpu
try:
    gpu()
except BackendUnavailableError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == (
        "cuda-bindings is not installed; run: pip install 'advmoe-deploy[gpu]'\n"
    )

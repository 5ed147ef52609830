"""Engines that need a GPU say in one line what is missing."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto
from onnx.helper import (
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor_value_info,
)

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import BackendUnavailableError, BundleError
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.export.targets import Target
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.select import ENGINES, ON_GPU, backend_of, open_runner
from advmoe_deploy.runtime.tensorrt.build import BuildOptions, build_engine
from advmoe_deploy.runtime.tensorrt.cuda import DeviceBuffer, PinnedBuffer, Stream
from advmoe_deploy.runtime.tensorrt.engine import TensorRtEngine
from advmoe_deploy.runtime.tensorrt.runner import DeviceRunner
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile, Shapes
from benchmarks.gpu.visit import cuda_layer
from tests.conftest import write_run
from tests.export.tensorrt.subjects import has_gpu
from tests.families import spec_of


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


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt:fp16"])
def test_a_bundle_without_engines_for_a_gpu(tiny_bundle: Bundle, engine: str) -> None:
    with pytest.raises(BundleError, match=r"not exported for tensorrt.*--format trt"):
        open_runner(tiny_bundle, engine)


def test_every_engine_belongs_to_a_backend() -> None:
    backends = {name: backend_of(name) for name in ENGINES}
    assert backends["onnxruntime-trt"] == backends["onnxruntime-plan"] == "onnxruntime"
    assert backends["tensorrt"] == "tensorrt"
    assert set(ON_GPU) < set(ENGINES)


def test_without_cuda_bindings_its_extra_is_named() -> None:
    program = """
import sys
sys.modules["cuda"] = None
from advmoe_deploy.errors import BackendUnavailableError
from advmoe_deploy.runtime.tensorrt.cuda import gpu
try:
    gpu()
except BackendUnavailableError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == (
        "cuda-bindings is not installed; run: pip install 'advmoe-deploy[gpu]' or "
        "'advmoe-deploy[rtx]'\n"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no GPU, or no TensorRT")
@pytest.mark.parametrize("family", ["wide ResNet", "conv experts", "token experts"])
def test_engines_answer_what_the_plan_answers(tmp_path: Path, family: str) -> None:
    write_run(tmp_path / "run", spec_of(family))
    batch = BatchProfile(min=1, opt=8, max=20)
    target = Target("tensorrt", "fp32", build=BuildOptions(batch=batch))
    bundle = export_run(tmp_path / "run", tmp_path / "bundle", data="random:64", targets=[target])
    images = np.random.default_rng(1).random((33, 1, 8, 8), dtype=np.float32)
    with open_runner(bundle, "tensorrt") as runner, open_runner(bundle) as other:
        for count in (33, 1, 7, 20, 1, 7):
            answer, expected = runner.infer(images[:count]), other.infer(images[:count])
            np.testing.assert_allclose(answer.logits, expected.logits, rtol=0, atol=1e-4)
            for layer, ids in expected.expert_ids.items():
                np.testing.assert_array_equal(answer.expert_ids[layer], ids)
        assert isinstance(runner, DeviceRunner)
        assert 0 < runner.device_ms(images[:20]) < 1000
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda n: runner.infer(images[n : n + 3]).logits, range(20)))
        for start, logits in enumerate(together):
            np.testing.assert_allclose(logits, expected_of(other, images, start), atol=1e-4)


def expected_of(runner: Runner, images: np.ndarray, start: int) -> np.ndarray:
    return runner.infer(images[start : start + 3]).logits


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no GPU, or no TensorRT")
def test_another_thread_may_take_memory_during_a_capture() -> None:
    def work() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: DeviceBuffer(100).close()).result(timeout=60)
        stream.download(pinned.address, there.address, 40)

    with Stream() as stream, PinnedBuffer(40) as pinned, DeviceBuffer(40) as there:
        pinned.array((10,), np.dtype(np.float32))[...] = 1
        with stream.captured(work) as graph:
            stream.launch(graph)
            stream.wait()
        assert not pinned.array((10,), np.dtype(np.float32)).any()


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no GPU, or no TensorRT")
def test_outputs_are_left_on_the_gpu_at_any_number_of_rows() -> None:
    ends = [make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in "xy"]
    graph = make_graph([make_node("Add", ["x", "x"], ["y"])], "g", ends[:1], ends[1:])
    model = make_model(graph, opset_imports=[make_opsetid("", 17)], ir_version=8)
    shapes = {"x": Shapes((1, 3), (4, 3), (8, 3))}
    plan = build_engine(model.SerializeToString(), shapes, BuildOptions())
    with TensorRtEngine(plan) as engine, Stream() as stream, PinnedBuffer(96) as pinned:
        for rows in (1, 5, 1, 8):  # one row has a profile of its own
            x_N3 = np.random.default_rng(rows).random((rows, 3), dtype=np.float32)
            np.testing.assert_array_equal(engine.run({"x": x_N3})["y"], 2 * x_N3)
            with engine.on_device({"x": x_N3}) as answers:
                said = answers["y"].__cuda_array_interface__
                stream.download(pinned.address, said["data"][0], 12 * rows)
                stream.wait()
            assert (said["shape"], said["typestr"]) == ((rows, 3), "<f4")
            there = pinned.array((rows, 3), np.dtype(np.float32))
            np.testing.assert_array_equal(there, 2 * x_N3)


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no GPU, or no TensorRT")
def test_our_cuda_layer_holds(tmp_path: Path) -> None:
    assert cuda_layer.measure(tmp_path / "cuda.json"), (tmp_path / "cuda.json").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no GPU, or no TensorRT")
def test_cuda_copies_there_and_back() -> None:
    values = np.arange(1000, dtype=np.float32)
    with Stream() as stream, PinnedBuffer(4000) as pinned, DeviceBuffer(4000) as there:
        pinned.array((1000,), values.dtype)[...] = values
        stream.upload(there.address, pinned.address, 4000)
        stream.wait()
        pinned.array((1000,), values.dtype)[...] = 0
        graph = stream.captured(lambda: stream.download(pinned.address, there.address, 4000))
        assert not pinned.array((1000,), values.dtype).any()  # captured, not run
        stream.launch(graph)
        stream.wait()
        np.testing.assert_array_equal(pinned.array((1000,), values.dtype), values)
        graph.close()

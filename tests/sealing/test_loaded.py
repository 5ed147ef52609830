"""What is loaded is what was hashed, whoever writes to the bundle meanwhile."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from advmoe_deploy.bundle import GOLDEN, MODEL, REFERENCE, Bundle
from advmoe_deploy.errors import BundleError
from advmoe_deploy.models.stored import reference_model
from advmoe_deploy.profiling.profile import profile_bundle
from advmoe_deploy.runtime.onnxruntime import custom_ops
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.sealing.golden import golden_arrays

GRAPHS = {
    "onnxruntime": MODEL,
    "onnxruntime-plan": "segments/router.onnx",
    "openvino": "engines/openvino-fp32/model.onnx",
    "openvino-plan": "segments/router.expert-1.onnx",
}


def other_weights(content: bytes) -> bytes:
    """Return a graph of the same size whose answers are others, and which loads just as well."""
    model = onnx.load_model_from_string(content)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.raw_data = (-numpy_helper.to_array(tensor)).astype(np.float32).tobytes()
    return model.SerializeToString()


@pytest.mark.parametrize(("engine", "graph"), GRAPHS.items())
def test_a_graph_that_is_swapped_after_its_hash_was_taken_does_not_run(
    copy: Bundle, engine: str, graph: str
) -> None:
    (copy.path / graph).write_bytes(other_weights((copy.path / graph).read_bytes()))
    with pytest.raises(BundleError, match="SHA-256 differs") as caught, open_runner(copy, engine):
        pass
    assert graph in str(caught.value)


@pytest.mark.parametrize(("engine", "graph"), GRAPHS.items())
def test_a_graph_that_is_swapped_as_soon_as_it_was_read_does_not_run(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch, engine: str, graph: str
) -> None:
    golden, real = golden_arrays(copy), Bundle.read

    def swapping(bundle: Bundle, name: str) -> bytes:
        content = real(bundle, name)
        if name != GOLDEN:
            (bundle.path / name).write_bytes(other_weights(content))
        return content

    monkeypatch.setattr(Bundle, "read", swapping)
    with open_runner(copy, engine) as runner:
        logits = runner.infer(golden["images"]).logits
    with pytest.raises(BundleError, match="SHA-256 differs"):
        real(copy, graph)  # it was swapped
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        (GOLDEN, golden_arrays),
        (REFERENCE, reference_model),
        ("baselines/dense.onnx", lambda b: profile_bundle(b, batches=(1,), n=2, warmup=1)),
    ],
)
def test_nothing_else_is_read_unhashed(
    copy: Bundle, name: str, use: Callable[[Bundle], object]
) -> None:
    content = bytearray((copy.path / name).read_bytes())
    content[-1] ^= 1
    (copy.path / name).write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256 differs"):
        use(copy)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "gone", "longer"])
def test_what_is_no_file_any_more_is_refused_at_once(copy: Bundle, kind: str) -> None:
    file = copy.path / MODEL
    aside = file.rename(copy.path.parent / "aside")
    if kind == "link":
        file.symlink_to(aside)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "longer":
        file.write_bytes(aside.read_bytes() + b"x")
    with pytest.raises(BundleError, match=MODEL), open_runner(copy):
        pass


def test_the_kernels_that_are_loaded_are_the_ones_that_were_hashed(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = custom_ops.find_custom_ops()
    if found.library is None:
        pytest.skip(found.reason)
    if not found.library.is_relative_to(tmp_path):
        pytest.skip("the package brings its library")
    found.library.write_bytes(b"\x7fELF, and nothing that could be loaded")
    monkeypatch.setattr(
        "advmoe_deploy.runtime.onnxruntime.engine.find_custom_ops", lambda *_: found
    )
    golden = golden_arrays(copy)
    with open_runner(copy) as runner:
        logits = runner.infer(golden["images"]).logits
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=3e-5)

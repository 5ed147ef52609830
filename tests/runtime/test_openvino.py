"""The OpenVINO engine says what it computes in, and refuses what it cannot."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import BackendUnavailableError, BundleError, UsageError
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.openvino.engine import OpenVinoEngine, has_precision
from advmoe_deploy.runtime.select import open_runner, parse_engine
from advmoe_deploy.specs import ComputeDtype

IMAGES = np.random.default_rng(0).random((32, 1, 8, 8), dtype=np.float32)


def test_a_segment_answers_what_onnx_runtime_answers_at_any_batch_size(tiny_bundle: Bundle) -> None:
    file = tiny_bundle.file("segments/router.onnx")
    with OpenVinoEngine(file, threads=1) as engine, OrtEngine(file, threads=1) as other:
        assert engine.output_names == other.output_names == ("router.scores",)
        for batch in (1, 5, 32, 3, 1):
            (scores,) = engine.run({"images": IMAGES[:batch]}).values()
            (expected,) = other.run({"images": IMAGES[:batch]}).values()
            np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


def test_no_rows_give_no_rows(tiny_bundle: Bundle) -> None:
    segment = tiny_bundle.manifest.plan.segment("router.expert-0")
    with OpenVinoEngine(tiny_bundle.file(segment.file)) as engine:
        (answer,) = engine.run({segment.inputs[0].name: IMAGES[:0]}).values()
    assert answer.shape == (0, 10)


def test_an_answer_outlives_the_next_one(tiny_bundle: Bundle) -> None:
    with OpenVinoEngine(tiny_bundle.file("segments/router.onnx")) as engine:
        first = engine.run({"images": IMAGES[:4]})["router.scores"]
        before = first.copy()
        engine.run({"images": IMAGES[4:8]})
    np.testing.assert_array_equal(first, before)


def test_threads_share_an_engine(tiny_bundle: Bundle) -> None:
    batches = [IMAGES[i : i + 1 + i % 5] for i in range(24)]
    with OpenVinoEngine(tiny_bundle.file("engines/openvino-fp32/model.onnx")) as engine:
        alone = [engine.run({"images": batch})["logits"] for batch in batches]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda x: engine.run({"images": x})["logits"], batches))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(not has_precision("bf16"), reason="this CPU has no bf16")
def test_bf16_is_taken_only_where_asked(tiny_bundle: Bundle) -> None:
    file = tiny_bundle.file("segments/router.onnx")

    def scores(precision: ComputeDtype) -> np.ndarray:
        with OpenVinoEngine(file, compute_dtype=precision, threads=1) as engine:
            return engine.run({"images": IMAGES})["router.scores"]

    exact, rounded = scores("fp32"), scores("bf16")
    assert 1e-5 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()


@pytest.mark.skipif(has_precision("fp16"), reason="this CPU has fp16")
def test_a_precision_that_the_cpu_lacks_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailableError, match=r"no fp16 on this CPU; use fp32"):
        OpenVinoEngine(tiny_bundle.file("segments/router.onnx"), compute_dtype="fp16")
    assert run(["export", "no run", "--format", "openvino", "--precision", "fp16"]) == 4


@pytest.mark.parametrize("content", [b"", b"no graph"])
def test_what_is_no_graph_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    for source in (content, tmp_path / "bad.onnx"):
        with pytest.raises(BundleError, match=r"OpenVINO cannot load") as caught:
            OpenVinoEngine(source)
        assert "\n" not in str(caught.value)


def test_a_closed_engine_and_negative_threads_are_refused(tiny_bundle: Bundle) -> None:
    file = tiny_bundle.file("segments/router.onnx")
    engine = OpenVinoEngine(file)
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.run({"images": IMAGES})
    with pytest.raises(UsageError, match="threads=-1"):
        OpenVinoEngine(file, threads=-1)


def test_a_changed_engine_file_is_refused_before_it_is_loaded(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy"))
    file = copy / "engines/openvino-fp32/model.onnx"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"openvino-fp32/model\.onnx is not what was exported"):
        open_bundle(copy)


def test_engine_names_carry_a_precision() -> None:
    assert parse_engine("openvino") == ("openvino", None)
    assert parse_engine("openvino-plan:bf16") == ("openvino-plan", "bf16")
    for name, complaint in (
        ("openvin", "did you mean openvino"),
        ("openvino:fp8", "unknown precision 'fp8'"),
        ("openvino:", "unknown precision ''"),
    ):
        with pytest.raises(UsageError, match=complaint):
            parse_engine(name)


def test_a_bundle_runs_only_at_precisions_it_was_exported_for(tiny_bundle: Bundle) -> None:
    for engine, format_ in (("openvino:bf16", "openvino"), ("onnxruntime-plan:int8", "onnx")):
        with pytest.raises(BundleError, match=rf"--format {format_} --precision") as caught:
            open_runner(tiny_bundle, engine)
        assert "\n" not in str(caught.value)

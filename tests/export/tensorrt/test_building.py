"""Engines are built by a script or here: its options, what it needs, what is recorded."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from advmoe_deploy.bundle import open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.export.targets import Target
from advmoe_deploy.export.tensorrt.from_bundle import build_from_bundle
from advmoe_deploy.export.tensorrt.trtexec import build_script
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile, Shapes
from advmoe_deploy.specs import Precision
from tests.conftest import assert_nothing_left
from tests.export.tensorrt.subjects import IMAGES, SMALL, has_gpu

TRT, SET = ("--format", "trt"), ("--set-build",)


@pytest.fixture(scope="module")
def bundle_of_graphs(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trt") / "bundle"
    (config := out.parent / "build.json").write_text('{"batch": {"max": 32}, "workspace_mib": 1}')
    options = ["--onnx-only", "--build-config", str(config)]
    options += ["--set-build", "batch.opt=8", "--set-build", "workspace_mib=512"]
    precisions = ["--precision", "fp32", "--precision", "fp16"]
    assert (
        run(["export", str(tiny_run), "--format", "trt", *precisions, *options, "--out", str(out)])
        == 0
    )
    return out


def test_graphs_and_script_are_recorded_and_hashed(bundle_of_graphs: Path) -> None:
    manifest = open_bundle(bundle_of_graphs).manifest
    assert [(e.backend, e.precision, e.device) for e in manifest.engines] == [
        ("tensorrt", "fp32", None),
        ("tensorrt", "fp16", None),
    ]
    for engines in manifest.engines:
        folder = f"engines/trt-onnx-{engines.precision}"
        assert {s.file for s in engines.plan.segments} <= manifest.files.keys()
        assert f"{folder}/build.sh" in manifest.files
        assert not engines.is_built
        assert engines.findings()[0].startswith("to be built on a GPU")
    card = (bundle_of_graphs / "MODEL_CARD.md").read_text()
    assert "graphs for `tensorrt:fp16`" in card


def test_the_script_calls_trtexec_once_per_graph(bundle_of_graphs: Path, tmp_path: Path) -> None:
    folder = bundle_of_graphs / "engines" / "trt-onnx-fp16"
    record = tmp_path / "calls"
    program = tmp_path / "trtexec"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {record}\n')
    program.chmod(0o755)
    environment = {**os.environ, "TRTEXEC": str(program), "OUT": str(tmp_path / "engines")}
    subprocess.run([folder / "build.sh"], env=environment, check=True, timeout=60)
    calls = record.read_text().splitlines()
    graphs = sorted(file.name for file in folder.glob("*.onnx"))
    assert sorted(call.split()[0].removeprefix("--onnx=") for call in calls) == graphs
    assert len(calls) >= 3
    for call in calls:
        assert "--stronglyTyped --noTF32 --memPoolSize=workspace:512" in call
        assert "--fp16" not in call
    (router,) = [call for call in calls if "--onnx=router.onnx" in call]
    assert (
        "--profile=0 "
        "--minShapes=images:1x1x8x8 --optShapes=images:8x1x8x8 --maxShapes=images:32x1x8x8 "
        "--profile=1 "
        "--minShapes=images:1x1x8x8 --optShapes=images:1x1x8x8 --maxShapes=images:1x1x8x8 "
        in router
    )
    (expert,) = [call for call in calls if "--onnx=router.expert-1.onnx" in call]
    assert "--optShapes=images:4x1x8x8 --maxShapes=images:32x1x8x8" in expert
    record.unlink()
    subprocess.run([folder / "build.sh"], env={**environment, "WEAK": "1"}, check=True, timeout=60)
    (expert,) = [c for c in record.read_text().splitlines() if "--onnx=router.expert-1.onnx" in c]
    assert "--fp16 --noTF32" in expert
    (router,) = [c for c in record.read_text().splitlines() if "--onnx=router.onnx" in c]
    assert "--fp16" not in router  # close scores would change places
    assert "--stronglyTyped" not in expert
    assert "--profile" not in expert
    assert expert.count("Shapes=") == 3


def test_the_script_tries_no_other_libraries_than_those_named() -> None:
    shapes = {"router": {"images": Shapes((1, 3), (8, 3), (32, 3))}}
    named = BuildOptions(tactic_sources=("JIT_CONVOLUTIONS", "CUDNN"))
    assert (
        "--tacticSources=-CUBLAS,-CUBLAS_LT,+CUDNN,-EDGE_MASK_CONVOLUTIONS,+JIT_CONVOLUTIONS "
        in build_script(shapes, {}, {}, named)
    )
    assert "--tacticSources" not in build_script(shapes, {}, {}, BuildOptions())


def test_what_is_built_elsewhere_is_not_rounded_here() -> None:
    build = BuildOptions(tf32=True)
    assert Target("tensorrt", "fp32", onnx_only=True, build=build).is_exact
    assert not Target("tensorrt", "fp32", build=build).is_exact
    assert not Target("tensorrt", "fp16").is_exact
    assert Target("openvino", "fp32").is_exact


@pytest.mark.skipif(has_gpu(), reason="there is a GPU, and TensorRT")
def test_without_a_gpu_it_ends_with_advice_and_nothing_is_left(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert run(["export", str(tiny_run), "--format", "trt", "--out", str(out)]) == 4
    complaint = capsys.readouterr().err
    assert "pip install 'advmoe-deploy[gpu]'" in complaint
    assert "--onnx-only" in complaint
    assert "--format trt-rtx compiles engines" in complaint
    assert complaint.count("\n") == 1
    assert_nothing_left(out)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--format", "onnx", *SET, "tf32=true"], "go with --format trt"),
        (["--format", "openvino", "--onnx-only"], "goes with --format trt"),
        ([*TRT, *SET, "batch.min=8", *SET, "batch.max=4"], "batch sizes must grow"),
        ([*TRT, *SET, "batch.max=many"], "batch.max: Input should be a valid integer"),
        ([*TRT, *SET, "bach.max=4"], "did you mean batch.max"),
        ([*TRT, *SET, "tf32"], "write key=value"),
        ([*TRT, *SET, "optimization_level=6"], "less than or equal to 5"),
        ([*TRT, *SET, "tactic_sources=CUDNN,CUBLASS"], "'CUBLAS'"),
        ([*TRT, *SET, "unquantised_dtype=fp16"], "--precision int8"),
        (["--format", "openvino", "--precision", "int8", *SET, "unquantised_dtype=fp16"], "trt"),
        ([*TRT, "--precision", "int8", *SET, "unquantised_dtype=bf16"], "'fp32' or 'fp16'"),
        ([*TRT, "--onnx-only", *SET, "tactic_sources=x"], "'CUDNN', 'EDGE_MASK_CONV"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", "no run", *options]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_build_config_that_is_no_json_object(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "build.json").write_text(content, encoding="latin-1")
    assert run(["export", "no run", *TRT, "--build-config", str(file)]) == 3
    assert "holds no JSON object" in capsys.readouterr().err


def test_batch_sizes_follow_from_those_that_are_given() -> None:
    given = [BatchProfile(), BatchProfile(max=32), BatchProfile(opt=2048), BatchProfile(min=100)]
    assert [(b.min, b.opt, b.max) for b in given] == [
        (1, 64, 1024),
        (1, 32, 32),
        (1, 2048, 2048),
        (100, 100, 1024),
    ]


def test_doctor_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)["gpu"]
    assert {"NVIDIA driver", "GPU", "CUDA for Python", "TensorRT"} <= parts.keys()
    for part in parts.values():
        assert (part["found"] is None) != (part["missing"] is None)


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no GPU, or no TensorRT")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_engines_are_built_examined_and_recorded(
    precision: Precision, tiny_run: Path, tmp_path: Path
) -> None:
    wanted = Target("tensorrt", precision, build=SMALL)
    export_run(tiny_run, tmp_path / "bundle", targets=[wanted])
    (engines,) = open_bundle(tmp_path / "bundle").manifest.engines
    assert engines.is_built
    assert engines.device is not None
    assert {s.file for s in engines.plan.segments} == {
        f"engines/trt-{precision}-{engines.device.slug}/{s.name}.engine"
        for s in engines.plan.segments
    }


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no GPU, or no TensorRT")
def test_engines_are_built_of_a_bundle(bundle_of_graphs: Path, tmp_path: Path) -> None:
    source = open_bundle(bundle_of_graphs)
    bundle = build_from_bundle(source, tmp_path / "bundle", build=SMALL)
    assert [e.is_built for e in bundle.manifest.engines] == [False, False, True, True]
    with open_runner(open_bundle(bundle.path), "tensorrt:fp16") as runner:
        assert runner.infer(IMAGES).logits.shape == (48, 10)

"""Engines compiled by NVIDIA's own builder, which needs no GPU: every family and precision.

What of it needs no library is run everywhere. Loading needs a GPU, the library's inspector
included: what is inspected here is the network that the library read, and the engine's names.
"""

import importlib.util
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import BackendUnavailableError, BundleError, CheckFailedError
from advmoe_deploy.export.engine_sets import write_engine_set
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.export.targets import Target
from advmoe_deploy.export.tensorrt.rtx import RtxCompiler, require_as_written
from advmoe_deploy.reports.devices import RtxDevice
from advmoe_deploy.runtime.tensorrt.api import logger, tensorrt
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.runtime.tensorrt.load import graph_files
from advmoe_deploy.runtime.tensorrt.rtx import targets
from advmoe_deploy.runtime.tensorrt.rtx.network import Network, NetworkTensor
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile, Shapes
from advmoe_deploy.specs import Precision
from benchmarks.gpu.rtx_builds import OF_DIGITS, graphs_of
from benchmarks.gpu.rtx_builds import compiled as compiled_of
from tests.conftest import TINY, assert_nothing_left
from tests.export.tensorrt.subjects import subject_for
from tests.families import FAMILIES, spec_of

BUILD = BuildOptions(batch=BatchProfile(min=1, opt=8, max=32))
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT for RTX is not installed: pip install 'advmoe-deploy[rtx]'",
)


def target(precision: Precision, **options: object) -> Target:
    return Target("tensorrt-rtx", precision, build=BUILD.model_copy(update=options))


def scored() -> tuple[ModelProto, Network]:
    """Return a graph that chooses, and what a library should read in it."""
    x, scores = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 2]) for n in "xs")
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", 1])
    nodes = [
        helper.make_node("Relu", ["x"], ["s"]),
        helper.make_node("ArgMax", ["s"], ["ids"], axis=1),
    ]
    graph = helper.make_graph(nodes, "g", [x], [ids], value_info=[scores])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    floats, chosen = NetworkTensor("FLOAT", (-1, 2)), NetworkTensor("INT64", (-1, 1))
    network = Network(
        {"x": floats}, {"ids": chosen}, {"s": floats, "ids": chosen}, Counter(TOPK=1, ACTIVATION=1)
    )
    return model, network


def test_what_is_read_is_what_was_written() -> None:
    model, network = scored()
    require_as_written("router", model, network)
    half, floats = NetworkTensor("HALF", (-1, 2)), network.inputs["x"]
    for changed, complaint in (
        (replace(network, inputs={"x": half}), "reads inputs"),
        (replace(network, inputs={"y": floats}), "reads inputs"),
        (replace(network, outputs={"ids": NetworkTensor("INT32", (-1, 1))}), "reads outputs"),
        (replace(network, outputs={"ids": NetworkTensor("INT64", (8, 1))}), "reads outputs"),
        (replace(network, kinds=Counter(ACTIVATION=2)), "reads 0 choices in router instead of 1"),
        (replace(network, made={**network.made, "s": half}), "HALF.*in router instead of float32"),
        (replace(network, made={}), "reads s as None"),
    ):
        with pytest.raises(CheckFailedError, match=complaint):
            require_as_written("router", model, changed)


@pytest.mark.parametrize(
    ("options", "code", "complaint"),
    [
        (["tf32=true"], 2, "takes no tf32"),
        (["version_compatible=true"], 2, "takes no version_compatible"),
        (["batch_min_profile=false"], 2, "takes no batch_min_profile"),
        (["optimization_level=5"], 2, "takes no optimization_level"),
        (["compute_capabilities=ada"], 2, "compute_capabilities"),
        (["unquantised_dtype=fp16"], 2, "goes with --precision int8"),
    ],
)
def test_options_that_it_has_not_are_refused(
    options: list[str], code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [word for option in options for word in ("--set-build", option)]
    assert run(["export", "no run", "--format", "trt-rtx", *settings]) == code
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("option", ["compute_capabilities=8.6", "weight_streaming=true"])
def test_options_that_it_alone_has_are_refused_elsewhere(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", "no run", "--format", "trt", "--set-build", option]) == 2
    assert "it is for trt-rtx" in capsys.readouterr().err


@pytest.fixture(scope="module")
def graphs(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of TensorRT's graphs in fp32."""
    out = tmp_path_factory.mktemp("rtx") / "graphs"
    export_run(tiny_run, out, targets=[Target("tensorrt", "fp32", onnx_only=True, build=BUILD)])
    return out


def test_without_the_library_it_ends_with_advice(graphs: Path, tmp_path: Path) -> None:
    program = """
import sys
sys.modules["tensorrt_rtx_bindings"] = None
from advmoe_deploy.cli.app import run
sys.exit(run(["export", sys.argv[1], "--format", "trt-rtx", "--out", sys.argv[2]]))
"""
    out = tmp_path / "bundle"
    done = subprocess.run(
        [sys.executable, "-c", program, str(graphs), str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 4
    assert "pip install 'advmoe-deploy[rtx]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert_nothing_left(out)


@pytest.fixture(scope="module")
def compiled(graphs: Path) -> Bundle:
    """A bundle of fp32 engines that the command made of a bundle of graphs."""
    options = ["--format", "trt-rtx", "--precision", "fp32", "--set-build", "batch.max=32"]
    assert run(["export", str(graphs), *options]) == 0
    return open_bundle(graphs.with_name("graphs-trt-rtx"))


@needs_rtx
def test_a_bundle_of_graphs_becomes_one_of_engines(compiled: Bundle) -> None:
    graphs, engines = compiled.manifest.engines
    assert (graphs.backend, engines.backend, engines.precision) == (
        "tensorrt",
        "tensorrt-rtx",
        "fp32",
    )
    device = engines.device
    assert isinstance(device, RtxDevice)
    assert compiled.manifest.versions["tensorrt-rtx"] == device.version
    folder = f"engines/trt-rtx-fp32-sm80-and-newer-{'.'.join(device.version.split('.')[:3])}"
    for name, file in graph_files(engines.plan).items():
        assert file == f"{folder}/{name}.engine"
        assert compiled.manifest.files[file].bytes > 50_000
    assert engines.findings()[:2] == [
        "for GPUs of compute capability 8.0, 8.6, 8.9, 12.0 and newer, "
        f"TensorRT for RTX {device.version}",
        "compiled without a GPU; measured in ONNX Runtime instead",
    ]
    assert "`--engine tensorrt-rtx:fp32`:" in (compiled.path / "MODEL_CARD.md").read_text()


@needs_rtx
def test_a_changed_byte_is_refused_before_anything_is_loaded(
    compiled: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(compiled.path, copy)
    (engine,) = copy.glob("engines/trt-rtx-*/router.engine")
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    # Without a GPU, 4 would be the answer of one that was to be loaded.
    assert run(["verify", str(copy), "--engine", "tensorrt-rtx:fp32"]) == 3
    assert "router.engine is not what was exported (SHA-256 differs)" in capsys.readouterr().err


@needs_rtx
def test_it_is_compiled_for_the_gpus_that_are_named(tmp_path: Path) -> None:
    options = {"compute_capabilities": ("8.6", "12.0"), "weight_streaming": True}
    engines = write_engine_set(tmp_path, target("fp32", **options), subject_for(TINY))
    device = engines.device
    assert isinstance(device, RtxDevice)
    assert device.compute_capabilities == ((8, 6), (12, 0))
    assert device.weight_streaming
    files = {file.name for file in (tmp_path / "engines").rglob("*sm86-sm120-*/*.engine")}
    assert files == {f"{name}.engine" for name in graph_files(engines.plan)}
    assert engines.parity.route_agreement >= 0.999


@needs_rtx
def test_the_builder_is_told_what_is_asked_for() -> None:
    trt = tensorrt("tensorrt-rtx")
    builder = trt.Builder(logger("tensorrt-rtx"))
    config = builder.create_builder_config()
    targets.configure(config, ("8.6", "12.0"), weight_streaming=True)
    told = [config.get_compute_capability(index) for index in range(2)]
    assert told == [trt.ComputeCapability.SM86, trt.ComputeCapability.SM120]
    assert config.get_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    config = builder.create_builder_config()
    targets.configure(config, (), weight_streaming=False)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert not config.get_flag(trt.BuilderFlag.WEIGHT_STREAMING)


def test_a_gpu_is_compiled_for_once() -> None:
    options = BuildOptions(compute_capabilities=("12.0", "8.6", "8.6"))
    assert options.compute_capabilities == ("8.6", "12.0")


@needs_rtx
def test_a_gpu_that_it_does_not_know_is_refused() -> None:
    compiler = RtxCompiler(BUILD.model_copy(update={"compute_capabilities": ("9.0",)}))
    with pytest.raises(BackendUnavailableError, match=r"7\.5, 8\.0, .*, not 9\.0"):
        compiler.build("g", scored()[0].SerializeToString(), {})


@needs_rtx
def test_a_graph_answers_for_its_own_engine_alone(tmp_path: Path) -> None:
    compiler, (graph, _) = RtxCompiler(BUILD), scored()
    engine = compiler.build("g", graph.SerializeToString(), {"x": Shapes((1, 2), (8, 2), (32, 2))})
    assert compiler.networks["g"].kinds["TOPK"] == 1
    (tmp_path / "g.engine").write_bytes(engine)
    with compiler.open(tmp_path / "g.engine") as runnable:
        answer = runnable.run({"x": np.array([[0, 1], [2, 1]], np.float32)})
    assert answer["ids"].tolist() == [[1], [0]]
    with pytest.raises(CheckFailedError, match="is not what was compiled"):
        compiler.open(engine[:-1])


@needs_rtx
def test_what_decides_on_the_device_is_refused_in_a_line() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, [2, "M"])
    graph = helper.make_graph([helper.make_node("NonZero", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(BundleError, match=r"cannot read g: .*NonZero"):
        RtxCompiler(BUILD).build(
            "g", model.SerializeToString(), {"x": Shapes((1, 2), (8, 2), (32, 2))}
        )


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_compiles(family: str, precision: Precision, tmp_path: Path) -> None:
    engines = write_engine_set(tmp_path, target(precision), subject_for(spec_of(family)))
    require_engines(tmp_path, list(graph_files(engines.plan).values()))
    assert precision in engines.segments.values()


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", OF_DIGITS)
def test_every_precision_compiles(precision: str) -> None:
    found = {name: compiled_of(name, *rest) for name, *rest in graphs_of("digits", precision)}
    assert len(found) == 4
    for name, facts in found.items():
        assert facts["bytes"] > 50_000
        assert (facts["kinds"].get("TOPK", 0) == 1) == (name == "router")
    quantised = {name for name, facts in found.items() if "QUANTIZE" in facts["kinds"]}
    experts = {"router.expert-0", "router.expert-1"}
    assert experts <= quantised if precision.startswith("int8") else not quantised


def require_engines(folder: Path, files: list[str]) -> None:
    assert len(files) >= 1
    assert min((folder / file).stat().st_size for file in files) > 10_000

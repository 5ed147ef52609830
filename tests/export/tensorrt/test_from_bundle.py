"""Engines that are built of a bundle's graphs, without torch: all but TensorRT itself runs here."""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper as onnx_numpy

from advmoe_deploy.bundle import GOLDEN, Bundle, open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import BundleError, CheckFailedError
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.export.tensorrt.builders import OnCpu, check_experts, experts_of
from advmoe_deploy.export.tensorrt.from_bundle import build_from_bundle
from advmoe_deploy.parity.golden import read_golden
from advmoe_deploy.profiling.profile import _raised
from advmoe_deploy.runtime.tensorrt.load import graph_files
from advmoe_deploy.runtime.tensorrt.shapes import Shapes
from advmoe_deploy.specs import Precision
from tests.conftest import assert_nothing_left, write_run
from tests.export.tensorrt.cpu_builder import BATCH, BUILD, CpuBuilder, graphs_in
from tests.families import spec_of


@pytest.fixture(scope="module")
def built(graphs: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same with engines."""
    out = tmp_path_factory.mktemp("built") / "bundle"
    return build_from_bundle(graphs, out, build=BUILD, builder=CpuBuilder())


def test_the_bundle_is_the_same_and_has_engines(graphs: Bundle, built: Bundle) -> None:
    before, after = graphs.manifest, open_bundle(built.path).manifest
    ours = before.files.keys() - {"MODEL_CARD.md"}
    assert {n: after.files[n] for n in ours} == {n: before.files[n] for n in ours}
    assert after.engines[:2] == before.engines
    for old, new in zip(before.engines, after.engines[2:], strict=True):
        assert (new.precision, new.segments) == (old.precision, old.segments)
        assert new.device == CpuBuilder().device
        assert new.findings()[0] == "for none (compute capability 0.0), TensorRT 1.2.3.4"
        assert "checked on the 64 images that travel with it" in new.findings()[1]
        folder = f"engines/trt-{new.precision}-none-sm00-1.2.3"
        files = graph_files(new.plan)
        assert len(files) > len(new.plan.segments)  # those that move rows, too
        assert files == {name: f"{folder}/{name}.engine" for name in files}
        assert set(files.values()) <= after.files.keys()
        assert built.engine_set("tensorrt", new.precision) == new
    assert {**before.versions, "tensorrt": "1.2.3.4"} == after.versions
    assert (after.plan, after.parity, after.model) == (before.plan, before.parity, before.model)


def test_the_card_names_the_engines_and_keeps_the_rest(graphs: Bundle, built: Bundle) -> None:
    before = (graphs.path / "MODEL_CARD.md").read_text()
    after = (built.path / "MODEL_CARD.md").read_text()
    assert "`--engine tensorrt:fp16`:" not in before
    assert "graphs for `tensorrt:fp16`:" in after
    assert "`--engine tensorrt:fp16`:" in after
    headings = [line for line in before.splitlines() if line.startswith("#")]
    assert [line for line in after.splitlines() if line.startswith("#")] == headings
    assert before.partition("## Graph passes")[2] == after.partition("## Graph passes")[2] != ""


def test_a_profile_names_what_is_raised_once(built: Bundle) -> None:
    sets = built.manifest.engines  # fp16 as graphs and as engines
    raised = [e.model_copy(update={"segments": {**e.segments, "router": "fp32"}}) for e in sets]
    changed = Bundle(built.path, built.manifest.model_copy(update={"engines": tuple(raised)}))
    plan = sets[-1].plan
    files = {name: built.file(file) for name, file in graph_files(plan).items()}
    with CpuBuilder().runner(plan, files, (1, 8, 8), "fp16") as runner:
        assert _raised(changed, runner) == {"fp32": ["router"]}


def test_fp16_is_reported_and_fp32_needs_parity(built: Bundle) -> None:
    fp32, fp16 = built.manifest.engines[2:]
    assert fp32.check is None
    assert fp32.parity.passed
    assert fp16.check is not None
    assert fp16.check.clean_accuracy is None  # there are no labels to count with
    assert fp16.parity.data == GOLDEN
    assert 0 < fp16.parity.max_abs_logit_diff < 0.2


def test_building_again_replaces_engines_where_they_are(built: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(built.path, copy)
    source = open_bundle(copy)
    again = build_from_bundle(
        source,
        copy,
        build=BUILD,
        precisions=["fp16"],
        overwrite=True,
        builder=CpuBuilder(tf32=True),
    )
    sets = [(e.precision, e.is_built, e.device and e.device.tf32) for e in again.manifest.engines]
    assert sets == [
        ("fp32", False, None),
        ("fp16", False, None),
        ("fp32", True, False),
        ("fp16", True, True),
    ]
    assert open_bundle(copy).manifest.files.keys() == built.manifest.files.keys()


@pytest.mark.parametrize("family", ["conv experts", "token experts"])
def test_other_families_are_built(family: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", spec_of(family))
    source = export_run(
        tmp_path / "run", tmp_path / "graphs", data="random:64", targets=[graphs_in("bf16")]
    )
    bundle = build_from_bundle(source, tmp_path / "out", build=BUILD, builder=CpuBuilder())
    engines = bundle.engine_set("tensorrt", "bf16")
    assert engines is not None
    assert engines.is_built
    assert engines.parity.route_agreement >= 0.99


class Careless(CpuBuilder):
    """Loses most of one engine's weights."""

    def __init__(self, victim: str) -> None:
        super().__init__()
        self.victim = victim

    def build(self, name: str, graph: bytes, shapes: Mapping[str, Shapes]) -> bytes:
        model = onnx.ModelProto.FromString(super().build(name, graph, shapes))
        for tensor in model.graph.initializer if name == self.victim else ():
            values = onnx_numpy.to_array(tensor)
            if values.ndim > 1 and values.dtype.kind == "f":
                tensor.CopyFrom(onnx_numpy.from_array(values * values.dtype.type(0.1), tensor.name))
        return model.SerializeToString()


@pytest.mark.parametrize("victim", ["router", "router.expert-0", "router.expert-1"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_broken_engine_leaves_nothing(
    victim: str, precision: Precision, graphs: Bundle, tmp_path: Path
) -> None:
    out, builder = tmp_path / "bundle", Careless(victim)
    with pytest.raises(CheckFailedError, match="no bundle was written") as complaint:
        build_from_bundle(graphs, out, build=BUILD, precisions=[precision], builder=builder)
    assert ("expert" in victim) == (f"the engine of {victim} is off" in str(complaint.value))
    assert_nothing_left(out)


def test_an_expert_may_answer_zeros(graphs: Bundle, tmp_path: Path) -> None:
    engines, x_N = graphs.manifest.engines[0], np.ones((3, 1, 8, 8), np.float32)
    plan, precisions = engines.plan, engines.segments

    def check(answer: float) -> None:
        expected = {}
        for name in experts_of(plan):
            (given,), (made,) = plan.segment(name).inputs, plan.segment(name).outputs
            expected[name] = {given.name: x_N}, {made.name: np.full((3, 10), answer, np.float32)}
        check_experts(tmp_path, plan, expected, OnCpu(BATCH), precisions, tf32=False)

    for name in experts_of(plan):
        file = plan.segment(name).file
        model = onnx.load_model(graphs.file(file))
        (last,) = (n for n in model.graph.node if n.output[0] == model.graph.output[0].name)
        last.output[0] = "answer"
        zero = onnx_numpy.from_array(np.zeros((), np.float32), "zero")
        model.graph.initializer.append(zero)
        made = model.graph.output[0].name
        model.graph.node.append(onnx.helper.make_node("Mul", ["answer", "zero"], [made], "none"))
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(model.SerializeToString())
    check(0.0)
    with pytest.raises(CheckFailedError, match=r"expert-0 is off by 100\.00%"):
        check(1.0)


def test_a_file_that_changes_meanwhile_is_noticed(graphs: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "graphs"
    shutil.copytree(graphs.path, copy)
    source = open_bundle(copy)
    (copy / "model.onnx").write_bytes(b"another")
    with pytest.raises(BundleError, match=r"model\.onnx is not what was exported"):
        build_from_bundle(source, tmp_path / "out", build=BUILD, builder=CpuBuilder())
    assert_nothing_left(tmp_path / "out")


def test_golden_routes_are_read_as_they_were_written(graphs: Bundle) -> None:
    images, answers = read_golden(graphs, ["router"])
    assert len(images) == len(answers.logits) == len(answers.routes["router"].expert_ids)
    assert answers.routes["router"].margins.min() >= 0


@pytest.mark.parametrize(
    ("options", "code", "complaint"),
    [
        (["--format", "onnx"], 2, "only engines of --format trt and trt-rtx are built"),
        (["--format", "trt", "--onnx-only"], 2, "--onnx-only goes with a run"),
        (
            ["--format", "trt", "--precision", "fp16", "--least-route-agreement", "0"],
            2,
            "--least-route-agreement goes with a run",
        ),
        (["--format", "trt", "--no-reference", "--data", "digits"], 2, "--data, --no-reference"),
        (
            ["--format", "trt", "--precision", "int8"],
            3,
            "write them with advmoe export RUN --format trt --precision int8 --onnx-only",
        ),
        (["--format", "trt", "--out", "."], 2, "holds the current directory"),
    ],
)
def test_what_cannot_be_built_of_a_bundle(
    options: list[str],
    code: int,
    complaint: str,
    graphs: Bundle,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["export", str(graphs.path), *options]) == code
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1


def test_a_bundle_without_graphs_is_told_how_to_get_them(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(tiny_bundle.path), "--format", "trt"]) == 3
    assert "holds no TensorRT graphs" in capsys.readouterr().err


WITHOUT_TORCH = """
import sys
for name in ("torch", "sklearn"):
    sys.modules[name] = None
"""


def test_without_torch_and_without_a_gpu_it_ends_with_advice(graphs: Bundle) -> None:
    program = f"""{WITHOUT_TORCH}
sys.modules["tensorrt"] = None
from advmoe_deploy.cli.app import run
sys.exit(run(["export", sys.argv[1], "--format", "trt"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(graphs.path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 4
    assert "pip install 'advmoe-deploy[gpu]'" in done.stderr
    assert "--onnx-only" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert_nothing_left(graphs.path.with_name("bundle-trt"))


def test_it_is_built_without_torch(graphs: Bundle, built: Bundle, tmp_path: Path) -> None:
    program = f"""{WITHOUT_TORCH}
from pathlib import Path
from advmoe_deploy.bundle import open_bundle
from advmoe_deploy.export.tensorrt.from_bundle import build_from_bundle
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from tests.export.tensorrt.cpu_builder import BATCH, CpuBuilder
source, out = map(Path, sys.argv[1:])
options = BuildOptions(batch=BATCH)
build_from_bundle(open_bundle(source), out, build=options, builder=CpuBuilder())
"""
    command = [sys.executable, "-c", program, str(graphs.path), str(tmp_path / "out")]
    root = Path(__file__).parents[3]
    subprocess.run(command, check=True, timeout=120, cwd=root)
    here, there = built.manifest, open_bundle(tmp_path / "out").manifest
    assert there.files == here.files
    assert [e.plan for e in there.engines] == [e.plan for e in here.engines]
    for one, other in zip(here.engines, there.engines, strict=True):
        assert np.isclose(one.parity.max_abs_logit_diff, other.parity.max_abs_logit_diff)

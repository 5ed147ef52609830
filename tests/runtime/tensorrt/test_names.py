"""Every name of TensorRT and CUDA that we use, held against the real bindings of each release.

The names are facts, taken from the wheels by ``benchmarks/gpu/tensorrt_names.py``. A name asked for
with ``probe`` may be missing from some releases, not from all.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
from advmoe_deploy.runtime.tensorrt.build import TACTIC_SOURCES
from benchmarks.gpu import tensorrt_names
from tests.runtime.tensorrt.bindings import Bindings, Name, names_of_ours

RUNTIME = ROOT / "advmoe_deploy" / "runtime" / "tensorrt"
NAMES = ROOT / "tests" / "data" / "tensorrt_names.json"
FOUND: dict[str, dict[str, dict[str, list[str]]]] = json.loads(NAMES.read_text())

FILES = sorted(RUNTIME.rglob("*.py"))
# Names that a vendor has as well, on objects of Python's and our own.
OURS = {
    name for kind in (str, bytes, dict, list, Path, np, np.ndarray, np.dtype) for name in dir(kind)
}
OURS |= {n for f in (ROOT / "advmoe_deploy").rglob("*.py") for n in names_of_ours(f.read_text())}


def bindings(code: str, vendor: str) -> Bindings:
    """Return the names of ``vendor`` in ``code``."""
    classes: dict[str, set[str]] = {}
    for release in FOUND[vendor].values():
        for owner, names in release.items():
            classes.setdefault(owner, set()).update(names)
    return Bindings(code, classes)


def lacking(names: set[Name], release: dict[str, list[str]]) -> set[Name]:
    return {
        (owner, name)
        for owner, name in names
        # The facts leave out "name", which every member of an enumeration has.
        if name not in release.get(owner, []) and name not in ("__init__", "name")
    }


def test_a_name_that_is_not_there_is_found_out() -> None:
    code = """
def build(self):
    trt = tensorrt()
    trt.Bilder
    self._config = trt.Builder(1).create_builder_config()
    self.configure(self._config, trt)
    probe(trt.BuilderFlag, "FP16")

def configure(self, anything, module):
    anything.set_flag(module.BuilderFlag.TF33)
    anything.set_flags(1)
"""
    found = bindings(code, "tensorrt")
    assert found.asked == {("BuilderFlag", "FP16")}
    for release in FOUND["tensorrt"].values():
        assert lacking(found.relied, release) == {
            ("", "Bilder"),
            ("BuilderFlag", "TF33"),
            ("IBuilderConfig", "set_flags"),
        }


def test_a_vendors_name_on_an_object_of_which_nothing_is_known_is_found_out() -> None:
    assert bindings("given.add_optimization_profile(1)", "tensorrt").unplaced == {
        "add_optimization_profile"
    }


def test_the_facts_are_of_all_three_major_releases() -> None:
    assert [version.split(".")[0] for version in FOUND["tensorrt"]] == ["10", "10", "11", "8"]
    eleven, eight = FOUND["tensorrt"]["11.4.0"], FOUND["tensorrt"]["8.6.1"]
    assert "FP16" in eight["BuilderFlag"]
    assert "FP16" not in eleven["BuilderFlag"]
    assert "STRONGLY_TYPED" not in eight["NetworkDefinitionCreationFlag"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(RUNTIME)))
@pytest.mark.parametrize("vendor", FOUND)
def test_every_name_is_in_every_release(file: Path, vendor: str) -> None:
    if file.parent.name == "rtx" and vendor == "tensorrt":
        return  # what RTX alone has
    used = bindings(file.read_text(), vendor)
    for version, release in FOUND[vendor].items():
        missing = lacking(used.relied, release)
        assert not missing, f"{file.name}: {vendor} {version} has no such names"
    for name in used.asked:
        everywhere = [r for releases in FOUND.values() for r in releases.values()]
        assert any(not lacking({name}, release) for release in everywhere), f"nobody has {name}"
    assert not used.unplaced - OURS, (
        "say in tests/runtime/tensorrt/bindings.py of which class these are"
    )


def test_tactic_sources_are_those_of_all_releases() -> None:
    known = [release["TacticSource"] for release in FOUND["tensorrt"].values()]
    assert set(TACTIC_SOURCES) == {name for names in known for name in names}


def test_names_are_found_in_our_files() -> None:
    relied = bindings((RUNTIME / "build.py").read_text(), "tensorrt").relied
    assert ("IBuilderConfig", "add_optimization_profile") in relied
    assert ("MemoryPoolType", "WORKSPACE") in relied
    assert len(relied) > 15


@pytest.mark.slow
def test_the_facts_are_what_the_wheels_say(tmp_path: Path) -> None:
    program = ROOT / "benchmarks" / "gpu" / "tensorrt_names.py"
    subprocess.run([sys.executable, str(program), str(tmp_path / "names.json")], check=True)
    assert json.loads((tmp_path / "names.json").read_text()) == FOUND


# Bindings alone: their builder needs a GPU, and what comes before and after it does not.
WITHOUT_A_GPU = """
import json, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt
from advmoe_deploy.errors import BackendUnavailableError
from advmoe_deploy.runtime.tensorrt import api
from advmoe_deploy.runtime.tensorrt import build
log, heard = api.logger(), api.listen()
log.log(trt.ILogger.Severity.WARNING, "a warning")
said = {"version": api.tensorrt_version(), "warnings": heard.reason()}
log.log(trt.ILogger.Severity.ERROR, "the\\n  cause")
log.log(trt.ILogger.Severity.VERBOSE, "not kept")
log.log(trt.ILogger.Severity.INTERNAL_ERROR, "what follows from it")
said["problem"] = heard.reason()
said["network"] = build._network_flags("tensorrt")
said["sources"] = build._sources(trt, ("JIT_CONVOLUTIONS", "EDGE_MASK_CONVOLUTIONS"))
try:
    build.build_engine(b"", {}, build.BuildOptions(), precision="fp16")
except BackendUnavailableError as error:
    said["error"] = str(error)
try:
    build.require_buildable("fp32", build.BuildOptions(version_compatible=True))
except BackendUnavailableError as error:
    said["lean"] = str(error)
json.dump(said, sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "numbers", "network", "sources"),
    [
        ("8.6.1", [8, 6, 1], 0b01, 0b11000),
        ("10.0.1", [10, 0, 1], 0b11, 0b11000),
        ("10.16.1", [10, 16, 1], 0b11, 0b11000),
        ("11.4.0", [11, 4, 0], 0b01, 0b00011),  # enumerations were numbered anew
    ],
)
def test_what_needs_no_gpu_runs_on_the_real_bindings(
    version: str, numbers: list[int], network: int, sources: int
) -> None:
    with tensorrt_names.unpacked(tensorrt_names.TENSORRT[version]) as folder:
        said = json.loads(tensorrt_names.run_with(folder, WITHOUT_A_GPU))
    assert (said["version"], said["network"], said["sources"]) == (numbers, network, sources)
    assert said["warnings"] == "a warning"
    assert said["problem"] == "the cause; what follows from it"
    assert "builds only where an NVIDIA GPU and its driver are" in said["error"]
    assert said["lean"].startswith(
        f"version_compatible engines carry libnvinfer_lean.so.{numbers[0]}, which is not here; "
    )


# What TensorRT asks of a plugin before it has shapes, on its own Python.
PLUGIN = """
import json, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt
from advmoe_deploy.errors import BackendUnavailableError
from benchmarks.gpu.experiments.router_plugin import RouterKernel, register_router
kernel = RouterKernel("entry", "ptx", top_k=2, rows_per_block=32, threads=128, shared_bytes=64)
try:
    register_router(kernel, "RouterTail", is_lazy=True)
except BackendUnavailableError as error:
    print(json.dumps({"error": str(error)}))
    sys.exit()
from tensorrt.plugin import TensorDesc, _lib
found = _lib.QDP_REGISTRY["advmoe::RouterTail"]
scores = TensorDesc()
scores.dtype = trt.DataType.FLOAT
scores.shape_expr = sys.modules["tensorrt.plugin"].ShapeExprs(2, _is_dummy=True)
outputs = found.register_func(scores)
entry, ptx, how, numbers = found.aot_impl_func(scores, outputs, None)
print(json.dumps({
    "outputs": found.num_outputs,
    "types": [str(output.dtype) for output in outputs],
    "dimensions": [len(output.shape_expr) for output in outputs],
    "kernel": [entry, ptx],
    "numbers": [type(number).__name__ for number in numbers],
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["10.0.1", "10.16.1", "11.4.0"])
def test_the_plugin_is_one_that_the_real_bindings_take(version: str) -> None:
    with tensorrt_names.unpacked(tensorrt_names.TENSORRT[version]) as folder:
        said = json.loads(tensorrt_names.run_with(folder, PLUGIN).splitlines()[-1])
    if version == "10.0.1":
        assert "use 10.9 or newer" in said["error"]
        return
    assert said == {
        "outputs": 2,
        "types": ["DataType.INT32", "DataType.FLOAT"],
        "dimensions": [2, 2],
        "kernel": ["entry", "ptx"],
        "numbers": ["SymInt32"],
    }

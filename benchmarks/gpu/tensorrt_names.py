"""The names that real bindings of TensorRT and CUDA have, written as JSON for the tests.

    python -m benchmarks.gpu.tensorrt_names tests/data/tensorrt_names.json

Downloads the bindings' wheels of each release with pip, 20 MB together, and asks Python what is in
them. Neither a GPU nor TensorRT's own libraries (gigabytes) are needed: stand-ins that a C compiler
makes satisfy the loader, and every function in them returns 0.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from advmoe_deploy.files import write_atomically

TENSORRT = {
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.0.1": "tensorrt-cu12-bindings==10.0.1",
    "10.16.1": "tensorrt-cu13-bindings==10.16.1.11",
    "11.4.0": "tensorrt-cu13-bindings==11.4.0.106",
}
RTX = {"1.7.1": "tensorrt-rtx-cu13-bindings==1.7.1.116"}
CUDA = {"12.9": "cuda-bindings==12.9.10", "13.5": "cuda-bindings==13.5.0"}
PATHFINDER = "cuda-pathfinder==1.*"

# What builds and runs a network; its layers are the parser's business.
CLASSES = """
    Builder BuilderFlag DataType EngineInspector HardwareCompatibilityLevel IBuilderConfig
    ICudaEngine IExecutionContext IHostMemory ILayer ILogger INetworkDefinition
    IOptimizationProfile
    IOutputAllocator IProfiler ITensor ITimingCache LayerInformationFormat Logger MemoryPoolType
    NetworkDefinitionCreationFlag OnnxParser ParserError PreviewFeature ProfilingVerbosity Runtime
    TacticSource TensorIOMode
"""
# Those that RTX alone needs.
RTX_CLASSES = """
    ComputeCapability DynamicShapesKernelSpecializationStrategy ExecutionContextAllocationStrategy
    IRuntimeCache IRuntimeConfig
"""
CUDA_CLASSES = "cudaDeviceAttr cudaError_t cudaMemcpyKind cudaStreamCaptureMode"
_OF_CUDA = re.compile(
    "cu(da)?(Ctx|Device|Driver|Error|Event|Free|Get|Graph|Host|Init|Malloc|Mem|Runtime|Stream)"
)

_SHOW = """
import importlib, json, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
for libraries in ("tensorrt_libs", "tensorrt_rtx_libs"):
    sys.modules[libraries] = None  # where they are installed they would be a name of the bindings
module = importlib.import_module({module!r})
def names(thing):
    left_out = [n for n in [*dir(thing), *dir(int)] if n.startswith("_") and n != "__version__"]
    return sorted({{*dir(thing)}} - {{*left_out, *dir(int)}})
found = {{"": names(module)}}
for name in {classes!r}:
    one = getattr(module, name)
    of_members = ("name", "value") if hasattr(one, "__members__") else ()
    found[name] = [n for n in names(one) if n not in of_members]
    for inner in names(one):
        if isinstance(getattr(one, inner), type):
            found[name + "." + inner] = names(getattr(one, inner))
json.dump(found, sys.stdout)
"""

Names = dict[str, list[str]]


def names_of(module: str, classes: list[str], *requirements: str) -> Names:
    """Return the names in a module of the wheels, and in some of its classes."""
    with unpacked(*requirements) as folder:
        found: Names = json.loads(run_with(folder, _SHOW.format(module=module, classes=classes)))
        return found


@contextmanager
def unpacked(*requirements: str) -> Iterator[Path]:
    """Yield a folder with what is in the wheels, and with what their libraries link to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "-qq", "download", "--no-deps"]
        options = ["--only-binary=:all:", "--dest", name]
        subprocess.run([*pip, *options, *requirements], check=True, timeout=600)
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        _write_stand_ins(folder)
        yield folder


def run_with(folder: Path, program: str) -> str:
    """Return what a Python program prints that imports from ``folder``, and from this checkout."""
    path = f"{folder}:{Path(__file__).parents[2]}"
    environment = {"PYTHONPATH": path, "LD_LIBRARY_PATH": str(folder), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


def _write_stand_ins(folder: Path) -> None:
    """Write into ``folder`` a library for each of TensorRT's that the bindings there link to."""
    for library in folder.glob("tensorrt*_bindings/tensorrt*.so"):
        symbols = re.findall(r" UND (\w+)$", _read("--dyn-syms", library), re.MULTILINE)
        own = [name for name in symbols if not re.match(r"_?Py|_ITM|__gmon", name)]
        source = folder / "stand_in.c"
        source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in own))
        for needed in re.findall(
            r"\[(lib(?:nv|tensorrt)\w+\.so\.\d+)\]", _read("--dynamic", library)
        ):
            command = ["cc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{needed}", str(source)]
            subprocess.run([*command, "-o", str(folder / needed)], check=True, timeout=60)


def _read(what: str, library: Path) -> str:
    command = ["readelf", "-W", what, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def of_cuda(release: str) -> Names:
    """Return what both modules have for memory, streams, events and graphs."""
    found = {}
    for module, classes in (("runtime", CUDA_CLASSES.split()), ("driver", [])):
        for owner, names in names_of(
            f"cuda.bindings.{module}", classes, release, PATHFINDER
        ).items():
            kept = names if owner else [name for name in names if _OF_CUDA.match(name)]
            found[".".join(filter(None, (module, owner)))] = kept
    return found


def main() -> None:
    """Write the names of every release."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    tensorrt = {
        version: names_of("tensorrt_bindings", CLASSES.split(), wheel)
        for version, wheel in TENSORRT.items()
    }
    rtx = {
        version: names_of("tensorrt_rtx_bindings", [*CLASSES.split(), *RTX_CLASSES.split()], wheel)
        for version, wheel in RTX.items()
    }
    cuda = {version: of_cuda(wheel) for version, wheel in CUDA.items()}
    found = {"tensorrt": tensorrt, "tensorrt-rtx": rtx, "cuda": cuda}
    text = json.dumps(found, indent=0, sort_keys=True)
    # A line per class or module.
    text = re.sub(r'\[\n"|",\n"|"\n\]', lambda m: m[0].replace("\n", ""), text)
    write_atomically(out, f"{text}\n".encode())


if __name__ == "__main__":
    main()

"""Libraries for ONNX Runtime's GPU providers are found wherever wheels lie."""

import subprocess
import sys
from pathlib import Path

import pytest

from advmoe_deploy.runtime.shared_libraries import load_library

ROOT = Path(__file__).parents[3]

# ONNX Runtime's own search, as its build for CUDA 13 does it.
PRELOAD = """
import onnxruntime
from advmoe_deploy.runtime.onnxruntime.gpu_libraries import nvidia_folders, preload
onnxruntime.cuda_version = "13.0"
preload(onnxruntime)
print([str(folder) for folder in nvidia_folders()])
with open("/proc/self/maps") as maps:
    print(sorted({line.split()[-1] for line in maps if "/nvidia/" in line}))
"""


# What the provider is linked to, here with stand-ins for both.
TENSORRT = """
from types import SimpleNamespace
from advmoe_deploy.errors import BackendUnavailableError
from advmoe_deploy.runtime.onnxruntime.gpu_libraries import load_tensorrt
try:
    load_tensorrt(SimpleNamespace(__file__="ort/__init__.py", __version__="1.31.1"))
except BackendUnavailableError as error:
    print(error)
with open("/proc/self/maps") as maps:
    print(sorted({line.split()[-1].rpartition("/")[2] for line in maps if "libnv" in line}))
"""


def make_library(file: Path, *needed: str) -> str:
    """Compile an empty library of this name that needs others, and return where it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{file.name}", "-xc", "-", "-o", str(file)]
    command += ["-xnone", "-Wl,--no-as-needed", *needed]
    subprocess.run(command, input="int nothing;", text=True, check=True, timeout=60)
    return str(file)


def said_by(program: str, folder: Path, *paths: Path) -> list[str]:
    """Return the lines that a program prints in ``folder`` that imports from ``paths``, too."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": ":".join(map(str, (*paths, ROOT))), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.splitlines()


def test_onnxruntimes_tensorrt_is_that_which_it_was_linked_to(tmp_path: Path) -> None:
    site = tmp_path / "site"
    names = ("libnvinfer.so.10", "libnvonnxparser.so.10")
    needed = [make_library(site / "tensorrt_libs" / name) for name in names]
    provider = "libonnxruntime_providers_tensorrt.so"
    make_library(tmp_path / "ort" / "capi" / provider, *needed)
    assert said_by(TENSORRT, tmp_path, site) == [str(list(names))]
    (site / "tensorrt_libs" / names[0]).rename(site / "tensorrt_libs" / "libnvinfer.so.11")
    refusal, loaded = said_by(TENSORRT, tmp_path, site)
    assert refusal == (
        "onnxruntime 1.31.1 was linked to TensorRT 10, and no libnvinfer.so.10 can be loaded; "
        "run: pip install 'tensorrt>=10,<11'"
    )
    assert loaded == "[]"


def test_a_library_is_loaded_from_a_wheel_or_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_library(tmp_path / "our_lean_libs" / "libour_lean.so.77")
    assert not load_library("libour_lean.so.77", "our_lean_libs")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_library("libour_lean.so.77", "our_lean_libs")
    assert load_library("libour_lean.so.77", "no_such_package")  # now by its name alone
    (tmp_path / "our_lean_libs" / "libbroken.so.1").write_bytes(b"no library")
    assert not load_library("libbroken.so.1", "our_lean_libs")


def test_wheels_outside_of_onnxruntimes_own_site_are_found(tmp_path: Path) -> None:
    one = make_library(tmp_path / "a" / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13")
    other = make_library(tmp_path / "b" / "nvidia" / "cudnn" / "lib" / "libcudnn.so.9")
    folders, loaded = said_by(PRELOAD, tmp_path, tmp_path / "a", tmp_path / "b")
    assert folders == str([str(Path(file).parent) for file in (one, other)])
    assert loaded == str([one, other])

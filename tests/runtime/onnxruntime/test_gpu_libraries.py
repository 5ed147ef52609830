"""Libraries for ONNX Runtime's GPU providers are found wherever wheels lie."""

import subprocess
import sys
from pathlib import Path

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


def make_library(file: Path, source: str = "int nothing;") -> str:
    """Compile an empty library of this name, and return where it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{file.name}", "-xc", "-", "-o", str(file)]
    subprocess.run(command, input=source, text=True, check=True, timeout=60)
    return str(file)


def test_wheels_outside_of_onnxruntimes_own_site_are_found(tmp_path: Path) -> None:
    one = make_library(tmp_path / "a" / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13")
    other = make_library(tmp_path / "b" / "nvidia" / "cudnn" / "lib" / "libcudnn.so.9")
    done = subprocess.run(
        [sys.executable, "-c", PRELOAD],
        env={"PYTHONPATH": f"{tmp_path / 'a'}:{tmp_path / 'b'}:{ROOT}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    folders, loaded = done.stdout.splitlines()
    assert folders == str([str(Path(file).parent) for file in (one, other)])
    assert loaded == str([one, other])

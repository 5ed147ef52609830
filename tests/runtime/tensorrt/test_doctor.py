"""The way to a GPU on machines where part of it is broken, here by stand-ins for its libraries."""

import subprocess
import sys
from pathlib import Path

import pytest

from advmoe_deploy.runtime.tensorrt.doctor import gpu_path
from benchmarks.gpu.visit import host_cuda

ROOT = Path(__file__).parents[3]
DOCTOR = """
from advmoe_deploy.runtime.tensorrt.doctor import gpu_path
for name, part in gpu_path().items():
    print(name, part.found, part.missing, sep="|")
"""
ANSWERS = "int cuDriverGetVersion(int *version) {{ *version = 13010; return {code}; }}"
NO_ANSWER = "a driver is there and does not answer; restart the machine"


def found_with(folder: Path, **sources: str) -> dict[str, list[str]]:
    """Return what doctor says beside libraries that are compiled from ``sources``, by name."""
    for name, source in sources.items():
        library = folder / f"lib{name.replace('_', '.so.')}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-xc", "-"]
        subprocess.run([*command, "-o", str(library)], input=source, text=True, check=True)
    done = subprocess.run(
        [sys.executable, "-c", DOCTOR],
        env={"PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    lines = [line.split("|") for line in done.stdout.splitlines()]
    return {name: rest for name, *rest in lines}


@pytest.mark.parametrize(
    ("driver", "found", "missing"),
    [
        (ANSWERS.format(code=0), "for CUDA up to 13.1", "None"),
        (ANSWERS.format(code=999), "None", NO_ANSWER),
        ("int nothing;", "None", NO_ANSWER),
    ],
)
def test_a_driver_that_is_broken_is_no_crash(
    tmp_path: Path, driver: str, found: str, missing: str
) -> None:
    path = found_with(tmp_path, cuda_1=driver)
    assert path["NVIDIA driver"] == [found, missing]
    assert path["GPU"][0] == "None"  # that driver has no GPU, and says so in a line


def test_a_gpu_that_fails_is_a_line() -> None:
    with host_cuda.installed() as host:
        assert gpu_path()["GPU"].found == "no GPU, the host's memory, compute capability 0.0"
    with host_cuda.installed() as host:
        host.failing["cudaGetDeviceCount"] = host_cuda.cudaError_t.cudaErrorInvalidValue
        part = gpu_path()["GPU"]
    assert (part.found, part.missing) == (
        None,
        "CUDA failed with cudaErrorInvalidValue: as the stand-in was told; run it again, then "
        "look at nvidia-smi",
    )


def test_an_older_cudnn_is_not_the_one_that_is_needed(tmp_path: Path) -> None:
    found, missing = found_with(tmp_path, cudnn_8="int nothing;")["cuDNN, which it needs"]
    assert found == "None"
    assert missing.endswith("NVIDIA's own package of cuDNN 9")
    found, _ = found_with(tmp_path, cudnn_9="int nothing;")["cuDNN, which it needs"]
    assert found == "libcudnn.so.9"

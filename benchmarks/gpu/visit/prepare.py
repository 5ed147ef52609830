"""Pack what a GPU machine lacks that reaches no registry, in files that fit one transfer each.

    python -m benchmarks.gpu.visit.prepare OUT --data cifar10:PATH [--only images,tensorrt]

Run beforehand, where pip works, on Linux with a C compiler, binutils and xz. OUT gets ``1/`` (test
images, small packages), ``tensorrt/``, ``onnxruntime/`` and ``training/`` (pieces of 46 MiB, and
``pieces.sha256``). The machine is taken to have Python 3.12 with PyTorch, onnx, onnxruntime (for
the CPU), safetensors, typer and rich; ``--python`` says another version.

TensorRT is 8.6.0, the last whose builder is a wheel on PyPI, with a CPython 3.10 of its own
(``--python310``, a prefix that may be moved, such as pyenv's).
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from advmoe_deploy.data.dataset import Split
from advmoe_deploy.data.registry import load_dataset, load_test_split

# What a call may bring, this checkout included, and so what a piece may be.
CALL_BYTES = 64 << 20
PIECE_BYTES = 46 << 20
TEST_IMAGES = 2048
_BATCHES = 5
_NAMES = "airplane automobile bird cat deer dog frog horse ship truck\n"
_TENSORRT = ("tensorrt==8.6.0", "cuda-bindings==12.9.*", "cuda-pathfinder", "numpy<2")
_BESIDE_IT = ("pydantic", "safetensors", "typer", "rich", "onnx>=1.17,<1.19", "typing-extensions")
# Without PyTorch and what it brings itself.
_FOR_TRAINING = (
    *("lightning-fabric", "lightning-utilities", "packaging"),
    *("tensorboard", "absl-py", "grpcio", "markdown", "markupsafe", "werkzeug"),
)
# What TensorRT's ready-made plugins link to, gigabytes of it; none of them is used.
_STAND_INS = ("libcublas.so.12", "libcublasLt.so.12", "libcudnn.so.8")
_LEFT_OUT = shutil.ignore_patterns(
    "test", "tests", "idlelib", "tkinter", "ensurepip", "__pycache__", "*.a", "site-packages",
    "share", "include",
)  # fmt: skip
_ACTIVATE = """here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=$here/python/lib/python3.10/site-packages
export PYTHONHOME=$here/python PATH=$here/python/bin:$PATH
export LD_LIBRARY_PATH=$here/python/lib:$site/tensorrt:${LD_LIBRARY_PATH:-}
"""


def images(out: Path, asked: argparse.Namespace) -> None:
    """Write test images as CIFAR's own binary batch, which needs no pyarrow, and small packages."""
    _write_batch(
        load_test_split(asked.data).first(TEST_IMAGES), out / "1" / "data" / "test_batch.bin"
    )
    site = out / "1" / "site" / asked.python
    _pip(site, asked.python, "pydantic", "pillow")


def tensorrt(out: Path, asked: argparse.Namespace) -> None:
    """Pack TensorRT 8.6.0 with an interpreter, and all that building and running takes."""
    with _packed(out / "tensorrt") as whole:
        python = whole / "python"
        shutil.copytree(asked.python310, python, symlinks=True, ignore=_LEFT_OUT)
        site = python / "lib" / "python3.10" / "site-packages"
        _pip(site, "3.10", *_TENSORRT, deps=False)
        _pip(site, "3.10", *_BESIDE_IT, "numpy<2")
        for library in _STAND_INS:
            write_stand_in(site / "tensorrt", library, "libnvinfer_plugin.so.8")
        for file in Path("/usr/lib/x86_64-linux-gnu").glob("libffi.so.*"):
            shutil.copy(file, python / "lib")  # ctypes wants the one it was built with
        (whole / "activate").write_text(_ACTIVATE)


def onnxruntime(out: Path, asked: argparse.Namespace) -> None:
    """Pack ONNX Runtime for CUDA; CUDA and cuDNN are those of PyTorch there."""
    with _packed(out / "onnxruntime") as whole:
        _pip(whole, asked.python, asked.onnxruntime, deps=False)


def training(out: Path, asked: argparse.Namespace) -> None:
    """Pack packages, and training and test images with names and sizes as CIFAR's authors have."""
    data = load_dataset(asked.data)
    with _packed(out / "training") as whole:
        _pip(whole / "site", asked.python, *_FOR_TRAINING, deps=False)
        for index, rows in enumerate(np.array_split(np.arange(len(data.train)), _BATCHES)):
            _write_batch(data.train.take(rows), whole / "data" / f"data_batch_{index + 1}.bin")
        _write_batch(data.test, whole / "data" / "test_batch.bin")


PACKS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "images": images,
    "tensorrt": tensorrt,
    "onnxruntime": onnxruntime,
    "training": training,
}


def _write_batch(split: Split, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    labels = split.labels[:, None].astype(np.uint8)
    np.concatenate([labels, split.images.reshape(len(split), -1)], axis=1).tofile(file)
    (file.parent / "batches.meta.txt").write_text(_NAMES)


def _pip(target: Path, python: str, *requirements: str, deps: bool = True) -> None:
    """Put wheels for another version of Python into a folder."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-compile"]
    command += ["--target", str(target), "--only-binary=:all:", "--python-version", python]
    command += [] if deps else ["--no-deps"]
    subprocess.run([*command, *requirements], check=True, timeout=1800)


@contextmanager
def _packed(out: Path) -> Iterator[Path]:
    """Yield a folder, and pack what is then in it."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        write_pieces(Path(name), out)


def write_pieces(folder: Path, out: Path, size: int = PIECE_BYTES) -> list[Path]:
    """Write a compressed archive of ``folder`` to ``out``, cut into pieces, with their hashes."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("piece.*"):
        old.unlink()
    command = 'tar -C "$1" -c . | xz -3 -T0 | split -b "$2" -d -a 2 - "$3/piece."'
    shell = ["bash", "-o", "pipefail", "-c", command, "pack", str(folder), str(size), str(out)]
    subprocess.run(shell, check=True, timeout=4 * 3600)  # hours where cores are busy
    pieces = sorted(out.glob("piece.*"))
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in pieces]
    (out / "pieces.sha256").write_text("".join(lines))
    return pieces


def write_stand_in(folder: Path, library: str, user: str) -> None:
    """Write a library with what ``user`` beside it wants of it: each function returns an error."""
    command = ["readelf", "-W", "--dyn-syms", str(folder / user)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    names = sorted({*re.findall(rf"(\w+)@{re.escape(library)}\b", symbols)})
    source = "".join(f"int {name}(void) {{ return 1; }}\n" for name in names)
    version = f"{library} {{ global: {' '.join(f'{name};' for name in names)} local: *; }};\n"
    with tempfile.NamedTemporaryFile("w", suffix=".map") as script:
        script.write(version)
        script.flush()
        link = [f"-Wl,-soname,{library}", f"-Wl,--version-script,{script.name}", "-xc", "-"]
        target = ["-o", str(folder / library)]
        build = ["cc", "-w", "-shared", "-fPIC", *link, *target]
        subprocess.run(build, input=source, text=True, check=True, timeout=60)


def main() -> None:
    """Pack what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", required=True, help="cifar10:PATH")
    parser.add_argument("--only", default=",".join(PACKS), help="names with commas")
    parser.add_argument("--python", default="3.12", help="the version that is there, for wheels")
    parser.add_argument("--python310", type=Path, help="the prefix of a CPython 3.10")
    parser.add_argument("--onnxruntime", default="onnxruntime-gpu==1.31.1", help="for its CUDA")
    asked = parser.parse_args()
    chosen = asked.only.split(",")
    if unknown := {*chosen} - {*PACKS}:
        parser.error(f"nothing is called {', '.join(sorted(unknown))}; {', '.join(PACKS)} are")
    if "tensorrt" in chosen and asked.python310 is None:
        parser.error("tensorrt needs --python310, the prefix of a CPython 3.10 to take along")
    for name in chosen:
        PACKS[name](asked.out, asked)
        print(f"{name}: packed", flush=True)


if __name__ == "__main__":
    main()

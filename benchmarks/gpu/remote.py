"""A bundle's engine in another Python interpreter: what PyTorch attacks, and TensorRT answers.

    python -m benchmarks.gpu.remote build BUNDLE OUT
    python -m benchmarks.gpu.remote run BUNDLE ENGINE

The first builds the fp16 engines of a bundle's graphs. The second reads batches of images from
standard input and writes predictions to standard output, as .npz, each behind its length, until
input ends.
"""

import io
import struct
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from threading import Lock
from typing import IO, Any

import numpy as np

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.closing import Closing
from advmoe_deploy.errors import MachineError
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.specs import Precision

_LENGTH = struct.Struct("<Q")


class RemoteRunner(Closing):
    """A runner whose engine is in a process of its own."""

    tf32 = False

    def __init__(self, python: str, bundle: Bundle, name: str, precision: Precision) -> None:
        """Start it; ``python`` is what a shell runs in the place of ``python``."""
        self.name, self.precision, self._lock = name, precision, Lock()
        words = _command(python, "run", str(bundle.path), f"{name}:{precision}")
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def infer(self, images: np.ndarray) -> Prediction:
        """Return the prediction for float32 images [N, C, H, W] in [0, 1], in their order."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            with suppress(BrokenPipeError):  # then its last words are on standard error
                _write(self._process.stdin, {"images": images})
            answer = _read(self._process.stdout)
        if answer is None:
            raise MachineError(f"the engine's process ended with code {self._process.wait()}")
        parts: dict[str, dict[str, np.ndarray]] = {"expert_ids": {}, "weights": {}}
        for name, values in answer.items():
            kind, _, layer = name.partition(":")
            if layer:
                parts[kind][layer] = values
        return Prediction(answer["logits"], parts["expert_ids"], parts["weights"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def build_remotely(python: str, bundle: Path, out: Path) -> Bundle:
    """Return ``bundle`` with the engines that another interpreter builds of its graphs."""
    subprocess.run(_command(python, "build", str(bundle), str(out)), check=True)
    return open_bundle(out)


def _command(python: str, *words: str) -> list[str]:
    return ["bash", "-c", f'{python} "$@"', "python", "-m", "benchmarks.gpu.remote", *words]


def _write(stream: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, **dict[str, Any](arrays))
    stream.write(_LENGTH.pack(content.tell()))
    stream.write(content.getbuffer())
    stream.flush()


def _read(stream: IO[bytes]) -> dict[str, np.ndarray] | None:
    """Return the arrays that come next, nothing at the end."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    with np.load(io.BytesIO(stream.read(*_LENGTH.unpack(head)))) as arrays:
        return dict(arrays)


def build(bundle: Path, out: Path) -> None:
    """Build the fp16 engines of a bundle's graphs."""
    from advmoe_deploy.export.tensorrt.from_bundle import build_from_bundle
    from advmoe_deploy.runtime.tensorrt.build import BuildOptions
    from benchmarks.gpu.common import BATCH
    from benchmarks.gpu.engines import tactics

    options = BuildOptions(batch=BATCH, tactic_sources=tactics())
    build_from_bundle(open_bundle(bundle), out, build=options, precisions=["fp16"], overwrite=True)


def run(bundle: Path, engine: str) -> None:
    """Answer until input ends."""
    answers = sys.stdout.buffer
    with redirect_stdout(sys.stderr), open_runner(open_bundle(bundle), engine) as runner:
        while (given := _read(sys.stdin.buffer)) is not None:
            answer = runner.infer(given["images"])
            arrays: dict[str, np.ndarray] = {"logits": answer.logits}
            arrays |= {f"expert_ids:{layer}": ids for layer, ids in answer.expert_ids.items()}
            arrays |= {f"weights:{layer}": values for layer, values in answer.weights.items()}
            _write(answers, arrays)


if __name__ == "__main__":
    _, what, where, last = sys.argv
    if what == "build":
        build(Path(where), Path(last))
    else:
        run(Path(where), last)

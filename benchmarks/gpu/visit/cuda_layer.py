"""Our CUDA layer on this machine's own driver and ``cuda-bindings``, part by part.

    python -m benchmarks.gpu.visit.cuda_layer --out cuda_layer.json [--dry-run]

Copies, zeros, captured graphs, events and execution slots, each checked by what it leaves in
memory; TensorRT is not needed. Parts are written when they are done. Ends with 1 if one failed.
``--dry-run`` puts the host's memory in the place of a GPU.
"""

import argparse
import json
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from advmoe_deploy.errors import AdvMoEError
from advmoe_deploy.files import write_atomically
from advmoe_deploy.runtime.tensorrt.cuda import DeviceBuffer, Event, PinnedBuffer, Stream, gpu
from advmoe_deploy.runtime.tensorrt.slot import Stored, TensorRtSlot
from advmoe_deploy.runtime.tensorrt.slots import View
from benchmarks.gpu.visit import host_cuda

Record = dict[str, Any]
_FLOAT = np.dtype(np.float32)
_COUNT = 1 << 20
_ROUNDS = 200


class Bench(ExitStack):
    """A stream, memory on both sides, and two events."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = self.enter_context(Stream())
        self.pinned = self.enter_context(PinnedBuffer(4 * _COUNT))
        self.there = self.enter_context(DeviceBuffer(4 * _COUNT))
        self.begun, self.done = (self.enter_context(Event(timed=True)) for _ in range(2))
        self.values = self.pinned.array((_COUNT,), _FLOAT)

    def up(self) -> None:
        """Queue a copy to the GPU."""
        self.stream.upload(self.there.address, self.pinned.address, 4 * _COUNT)

    def down(self) -> None:
        """Queue a copy back."""
        self.stream.download(self.pinned.address, self.there.address, 4 * _COUNT)


def facts(_: Bench) -> Record:
    """Return what CUDA says of the GPU."""
    return dict(vars(gpu()))


def copies(bench: Bench) -> Record:
    """Copy there and back; memory of the GPU is zero at first."""
    bench.values[...] = 7
    bench.down()
    bench.stream.wait()
    zero = not bench.values.any()
    bench.values[...] = expected = np.arange(_COUNT, dtype=np.float32)
    bench.up()
    bench.stream.wait()
    bench.values[...] = 0
    bench.down()
    bench.stream.wait()
    return {"holds": zero and bool((bench.values == expected).all())}


def zeros(bench: Bench) -> Record:
    """Clear half of it."""
    bench.values[...] = 1
    bench.up()
    bench.stream.clear(bench.there.address, 2 * _COUNT)
    bench.down()
    bench.stream.wait()
    half = _COUNT // 2
    return {"holds": not bench.values[:half].any() and bool((bench.values[half:] == 1).all())}


def capture(bench: Bench) -> Record:
    """Capture a copy, which must not run then, and launch it twice."""
    bench.values[...] = 0
    bench.up()
    bench.stream.wait()
    with bench.stream.captured(bench.down) as graph:
        bench.values[...] = 1
        bench.stream.wait()
        idle = bool(bench.values.all())
        ran = []
        for _ in range(2):
            bench.values[...] = 1
            bench.stream.launch(graph)
            bench.stream.wait()
            ran.append(not bench.values.any())
    return {"holds": idle and all(ran)}


def failed_capture(bench: Bench) -> Record:
    """Break a capture, as an engine that cannot be captured does; all must work as before."""

    def waits() -> None:
        bench.up()
        bench.stream.wait()  # nobody may wait for what is only captured
        raise AdvMoEError("a GPU lets nobody wait here")  # as the stand-in does

    said = ""
    try:
        bench.stream.captured(waits).close()
    except AdvMoEError as error:
        said = str(error)
    return {
        "holds": bool(said) and copies(bench)["holds"] and capture(bench)["holds"],
        "said": said,
    }


def times(bench: Bench) -> Record:
    """Return what events and the host's clock say of copies, and what each call costs the host."""
    begun = time.perf_counter()
    bench.begun.record(bench.stream)
    for _ in range(_ROUNDS):
        bench.up()
    queued = time.perf_counter()
    bench.done.record(bench.stream)
    bench.stream.wait()
    ended = time.perf_counter()
    device = bench.done.ms_since(bench.begun)
    with bench.stream.captured(bench.up) as graph:
        bench.stream.launch(graph)
        bench.stream.wait()
        before = time.perf_counter()
        for _ in range(_ROUNDS):
            bench.stream.launch(graph)
        launched = time.perf_counter()
        bench.stream.wait()
    return {
        "holds": 0 < device <= 1e3 * (ended - begun),
        "device_ms": device,
        "host_ms": 1e3 * (ended - begun),
        "us_per_queued_copy": 1e6 * (queued - begun) / _ROUNDS,
        "us_per_launched_graph": 1e6 * (launched - before) / _ROUNDS,
        "gib_per_s": _ROUNDS * 4 * _COUNT / 2**30 / (device / 1e3),
    }


def slots(_: Bench) -> Record:
    """Send batches of images through an execution slot, and take its time."""
    images = np.random.default_rng(0).random((256, 3, 32, 32), dtype=np.float32)
    stored = Stored(_FLOAT, len(images), images.shape[1:])
    host, device, holds = [], [], True
    with TensorRtSlot({}, {"images": stored}, streams=2) as slot:
        for _round in range(20):
            begun = time.perf_counter()
            slot.put("images", images, check=lambda piece: None)
            host.append(1e3 * (time.perf_counter() - begun))
            slot.begin()
            (answer,) = slot.get(View("images", len(images)))
            device.append(slot.elapsed_ms())
            holds &= bool((answer == images).all())
    return {"holds": holds, "put_ms": host, "from_there_to_here_ms": device}


PARTS: tuple[Callable[[Bench], Record], ...] = (
    facts,
    copies,
    zeros,
    capture,
    failed_capture,
    times,
    slots,
)


def measure(out: Path) -> bool:
    """Run all parts, write each, and return whether all hold."""
    found: dict[str, Record] = {}
    with Bench() as bench:
        for part in PARTS:
            try:
                found[part.__name__] = part(bench)
            except Exception as error:
                line = " ".join(str(error).split())
                where = traceback.extract_tb(error.__traceback__)[-1]
                failed = f"{type(error).__name__}: {line}, {where.name}:{where.lineno}"
                found[part.__name__] = {"holds": False, "failed": failed}
            write_atomically(out, json.dumps(found, indent=1).encode())
            print(part.__name__, found[part.__name__].get("holds", "-"), flush=True)
    return all(part.get("holds", True) for part in found.values())


def main() -> None:
    """Measure, on the GPU or in its stead."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="in the host's memory")
    asked = parser.parse_args()
    with ExitStack() as stack:
        if asked.dry_run:
            stack.enter_context(host_cuda.installed())
        holds = measure(asked.out)
    raise SystemExit(0 if holds else 1)


if __name__ == "__main__":
    main()

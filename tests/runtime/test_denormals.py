"""Denormal numbers are zeros to every engine, in whatever thread it is called."""

from collections.abc import Callable
from queue import Queue
from threading import Thread

import numpy as np
import pytest

from advmoe_deploy.export.graph.writer import GraphWriter
from advmoe_deploy.plan import TensorInfo
from advmoe_deploy.runtime.denormals import flush_denormals
from advmoe_deploy.runtime.engine import Engine
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.openvino.engine import OpenVinoEngine

# Enough for every thread of a pool to get a share.
VALUES = np.full(400_000, 1000, np.int32).view(np.float32)  # 1e-42


def half() -> bytes:
    writer = GraphWriter()
    writer.emit("Mul", ["x", writer.constant("half", np.array(0.5, np.float32))], "out")
    ends = [TensorInfo(name=name, dtype="float32", shape=("N",)) for name in ("x", "out")]
    return writer.model("half", ends[:1], ends[1:]).SerializeToString()


def zeros(engine: Engine) -> float:
    """The share of exact zeros; compared as numbers, denormals would be some too."""
    return float((engine.run({"x": VALUES})["out"].view(np.int32) == 0).mean())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", [OrtEngine, OpenVinoEngine])
def test_every_thread_of_an_engine_flushes(
    kind: Callable[..., OrtEngine | OpenVinoEngine], threads: int
) -> None:
    if kind is OrtEngine and not flush_denormals():
        pytest.skip("the mode of this processor is not known")
    shares: list[float] = []
    engines: Queue[Engine] = Queue()
    # A thread that was there before the engine inherits nothing from whoever opened it.
    caller = Thread(target=lambda: shares.append(zeros(engines.get())))
    caller.start()
    with kind(half(), threads=threads) as engine:
        engines.put(engine)
        caller.join()
        shares.append(zeros(engine))
    assert shares == [1.0, 1.0]


def test_a_thread_flushes_when_told_and_tells_those_it_starts() -> None:
    if not flush_denormals():
        pytest.skip("the mode of this processor is not known")
    left: list[int] = []

    def count() -> None:
        left.append(np.count_nonzero((VALUES * np.float32(0.5)).view(np.int32)))

    caller = Thread(target=count)
    caller.start()
    caller.join()
    assert left == [0]

"""The stage of ``gpu_trt.py`` that measures what the GPU does at best."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from advmoe_deploy.specs import Precision
from benchmarks.gpu.common import Record, Work, nvidia_smi
from benchmarks.gpu.engines import tactics

Part = tuple[str, Callable[[], Any]]
_GIB = 1 << 30
_SIDE = 8192


def device(work: Work) -> Iterator[Part]:
    """Look at the GPU, and measure what it does at best: a large copy and a large product."""
    yield "gpu", _gpu
    yield "copies", _copies
    for precision in work.precisions:
        yield f"matrix product, {precision}", partial(_product, work, precision)


def _gpu() -> Record:
    from advmoe_deploy.runtime.tensorrt.cuda import gpu

    return {**vars(gpu()), "clocks": nvidia_smi("clocks.sm,clocks.max.sm,clocks.mem")}


def _copies() -> Record:
    """Return GiB/s read or written once, within the GPU and from and to pinned memory."""
    from advmoe_deploy.runtime.tensorrt.cuda import DeviceBuffer, Event, PinnedBuffer, Stream

    with ExitStack() as stack:
        there, other = (stack.enter_context(DeviceBuffer(_GIB)) for _ in range(2))
        pinned = stack.enter_context(PinnedBuffer(_GIB))
        stream = stack.enter_context(Stream())
        start, end = (stack.enter_context(Event()) for _ in range(2))

        def gib_per_s(copy: Callable[[], None]) -> list[float]:
            speeds = []
            for _ in range(10):
                start.record(stream)
                copy()
                end.record(stream)
                stream.wait()
                speeds.append(round(1e3 / end.ms_since(start), 3))
            return speeds

        return {
            "within the GPU (read and written)": gib_per_s(
                lambda: stream.copy(other.address, there.address, _GIB)
            ),
            "to the GPU": gib_per_s(lambda: stream.upload(there.address, pinned.address, _GIB)),
            "from the GPU": gib_per_s(lambda: stream.download(pinned.address, there.address, _GIB)),
        }


def _product(work: Work, precision: Precision) -> Record:
    """Return the TFLOP/s of TensorRT's own product of two large matrices."""
    import onnx
    from onnx import TensorProto, helper

    from advmoe_deploy.runtime.tensorrt.build import BuildOptions, build_engine
    from advmoe_deploy.runtime.tensorrt.engine import TensorRtEngine
    from advmoe_deploy.runtime.tensorrt.shapes import Shapes

    kind = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(n, kind, ["N", _SIDE]) for n in ("a", "b", "c")]
    node = helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = helper.make_graph([node], "product", ends[:2], ends[2:])
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    size = Shapes(*[(_SIDE, _SIDE)] * 3)
    options = BuildOptions(tactic_sources=tactics())
    built = build_engine(
        model.SerializeToString(), {"a": size, "b": size}, options, precision=precision
    )
    dtype = np.float16 if precision == "fp16" else np.float32
    ones = np.ones((_SIDE, _SIDE), dtype)
    with TensorRtEngine(built, contexts=1) as engine:
        milliseconds = engine.device_ms({"a": ones, "b": ones}, rounds=20)
    flop = 2 * _SIDE**3
    return {"ms": milliseconds, "tflop_per_s": flop / np.median(milliseconds) / 1e9}

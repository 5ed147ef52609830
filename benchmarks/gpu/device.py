"""The stage of ``main.py`` that measures what the GPU does at best."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import numpy as np

from advmoe_deploy.specs import Precision
from benchmarks.gpu.common import Part, Record, Work, nvidia_smi
from benchmarks.gpu.engines import tactics

_GIB = 1 << 30
_SIDE, _DRY_SIDE = 8192, 256


def device(work: Work) -> Iterator[Part]:
    """Look at the GPU, and measure what it does at best: a large copy and a large product."""
    if not work.dry:
        yield "gpu", _gpu
        yield "copies", _copies
    for precision in work.precisions:
        yield f"matrix product, {precision}", partial(_product, work, precision)


def matrices(side: int, precision: Precision) -> dict[str, np.ndarray]:
    """Return two square matrices of normal values: of equal ones a GPU needs less power."""
    random, dtype = np.random.default_rng(0), np.float16 if precision == "fp16" else np.float32
    return {name: random.standard_normal((side, side), np.float32).astype(dtype) for name in "ab"}


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
        start, end = (stack.enter_context(Event(timed=True)) for _ in range(2))

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
    """Return the TFLOP/s of TensorRT's own product of two large matrices.

    In a dry run, how far ONNX Runtime's product of smaller ones is from NumPy's.
    """
    from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
    from advmoe_deploy.runtime.tensorrt.build import BuildOptions, build_engine
    from advmoe_deploy.runtime.tensorrt.engine import TensorRtEngine
    from advmoe_deploy.runtime.tensorrt.shapes import Shapes

    side = _DRY_SIDE if work.dry else _SIDE
    given, graph = matrices(side, precision), _product_graph(side, precision)
    if work.dry:
        with OrtEngine(graph) as engine:
            product = engine.run(given)["c"]
        exact = given["a"].astype(np.float64) @ given["b"].astype(np.float64)
        return {"max_relative_diff": float(np.abs(product - exact).max() / np.abs(exact).max())}
    size = Shapes(*[(side, side)] * 3)
    options = BuildOptions(tactic_sources=tactics())
    built = build_engine(graph, dict.fromkeys(given, size), options, precision=precision)
    with TensorRtEngine(built, contexts=1) as fast:
        milliseconds = fast.device_ms(given, rounds=20)
    return {"ms": milliseconds, "tflop_per_s": 2 * side**3 / np.median(milliseconds) / 1e9}


def _product_graph(side: int, precision: Precision) -> bytes:
    import onnx
    from onnx import TensorProto, helper

    kind = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(n, kind, ["N", side]) for n in "abc"]
    node = helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = helper.make_graph([node], "product", ends[:2], ends[2:])
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()

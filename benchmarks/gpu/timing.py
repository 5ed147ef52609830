"""The stages of ``main.py`` that time TensorRT: the MoE, its baselines and each engine."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from advmoe_deploy.plan import ExpertsStep, Plan, RunStep, Segment, TensorInfo
from advmoe_deploy.profiling.timing import time_interleaved
from advmoe_deploy.runtime.tensorrt.runner import DeviceRunner
from advmoe_deploy.specs import Precision
from benchmarks.gpu.common import Part, Record, Work, ratios_to, summary
from benchmarks.gpu.engines import (
    BASELINES,
    images_of,
    open_moe,
    open_plan,
    set_of,
)

_DTYPES: dict[int, str] = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}


def latency(work: Work) -> Iterator[Part]:
    """Time the MoE and its baselines in turn: from images in memory to answers, and on the GPU."""
    for model in work.models:
        for precision in work.precisions:
            for batch in work.batches:
                name = f"{model} {precision} batch {batch}"
                yield name, partial(_latency, work, model, precision, batch)


def _latency(work: Work, model: str, precision: Precision, batch: int) -> Record:
    pixels = images_of(work, model, batch)
    with ExitStack() as stack:
        runners = {"moe": stack.enter_context(open_moe(work, model, precision))}
        for name in BASELINES:
            runners[name] = stack.enter_context(open_baseline(work, model, name, precision))
        ids = runners["moe"].infer(pixels).expert_ids
        loads = {layer: np.bincount(each.reshape(-1)).tolist() for layer, each in ids.items()}
        return {"loads": loads, **timed(work, runners, pixels)}


def timed(
    work: Work,
    runners: Mapping[str, DeviceRunner],
    pixels: np.ndarray,
    bases: tuple[str, ...] = ("dense",),
) -> Record:
    """Return what ``runners`` take in turn, by the host's clock and by the device's own.

    Ratios are to each of ``bases``.
    """
    calls: dict[str, Callable[[], object]] = {
        name: partial(runner.infer, pixels) for name, runner in runners.items()
    }
    times = time_interleaved(calls, warmup=10, budget_s=work.seconds / 2, most=1500)
    clocks: dict[str, Callable[[], float]] = {
        name: partial(runner.device_ms, pixels) for name, runner in runners.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(1 if work.dry else len(times[bases[0]])):
        for name, clock in clocks.items():
            seconds[name].append(clock() / 1e3)
    device = {name: np.array(each) for name, each in seconds.items()}
    return {
        "times": summary(times),
        "ratios": {k: v for base in bases for k, v in ratios_to(times, base).items()},
        "device_times": summary(device),
        "device_ratios": {k: v for base in bases for k, v in ratios_to(device, base).items()},
    }


def open_baseline(work: Work, model: str, name: str, precision: Precision) -> DeviceRunner:
    """Return the runner of a baseline: a plan of one segment, so the same host work as the MoE."""
    graph = work.baseline(model, name, precision)
    return open_plan(work, model, _plan_of(graph), {name: graph}, precision)


def _plan_of(file: Path) -> Plan:
    graph = onnx.load_model(file, load_external_data=False).graph
    segment = Segment(
        name=file.stem.rpartition("-")[0],
        file=file.name,
        inputs=tuple(map(_info, graph.input)),
        outputs=tuple(map(_info, graph.output)),
    )
    steps = (RunStep(segment=segment.name),)
    return Plan(segments=(segment,), steps=steps, inputs=("images",), outputs=("logits",))


def _info(value: onnx.ValueInfoProto) -> TensorInfo:
    kind = value.type.tensor_type
    shape = tuple(size.dim_param or size.dim_value for size in kind.shape.dim)
    return TensorInfo(name=value.name, dtype=_DTYPES[kind.elem_type], shape=shape)


def parts(work: Work) -> Iterator[Part]:
    """Time each engine alone on the GPU: what is left of the MoE's time is routing."""
    for model in work.models:
        for precision in work.precisions:
            for batch in work.batches:
                name = f"{model} {precision} batch {batch}"
                yield name, partial(_parts, work, model, precision, batch)


def _parts(work: Work, model: str, precision: Precision, batch: int) -> Record:
    bundle, chosen = set_of(work, model, precision)
    with open_moe(work, model, precision) as runner:
        ids = runner.infer(images_of(work, model, batch)).expert_ids
    milliseconds = {}
    names = [segment.name for segment in chosen.plan.segments]
    for name in [*names, *BASELINES]:
        inputs = _inputs(work, model, chosen.plan, name, batch, ids)
        if inputs is not None:
            file = work.baseline(model, name, precision)
            if name not in BASELINES:
                file = bundle.file(chosen.plan.segment(name).file)
            milliseconds[name] = _engine_ms(work, model, precision, name, file, inputs)
    return {name: {"p50_ms": float(np.median(ms)), "ms": ms} for name, ms in milliseconds.items()}


def _engine_ms(
    work: Work, model: str, precision: Precision, name: str, graph: Path, inputs: Record
) -> list[float]:
    """Return the milliseconds of an engine's runs; in a dry run its graph runs once, untimed."""
    from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
    from advmoe_deploy.runtime.tensorrt.engine import TensorRtEngine

    if work.dry:
        with OrtEngine(graph) as engine:
            engine.run(inputs)
        return [0.0]
    file = work.engines(model, precision) / f"{name}.engine"
    with TensorRtEngine(file, contexts=1) as built:
        return built.device_ms(inputs, rounds=50)


def _inputs(
    work: Work, model: str, plan: Plan, name: str, batch: int, ids: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray] | None:
    """Return inputs of as many rows as an engine gets in this batch; nothing if it gets none."""
    if name in BASELINES:
        return {"images": images_of(work, model, batch)}
    experts = [step for step in plan.steps if isinstance(step, ExpertsStep)]
    rows = {
        segment: int((ids[step.layer] == expert).sum())
        for step in experts
        for expert, segment in zip(plan.route(step.layer).kept, step.segments, strict=True)
    }
    random = np.random.default_rng(0)
    inputs = {}
    for end in plan.segment(name).inputs:
        first = str(end.shape[0])
        count = rows[name] if first == "R" else batch * int(first.removesuffix("N").strip("*") or 1)
        if count == 0:
            return None
        inputs[end.name] = random.random((count, *map(int, end.shape[1:])), np.float32)
    return inputs

"""The stage of ``main.py`` that asks whether the router's tail is faster as a plugin.

Needs TensorRT 10.9 or newer and Triton in one interpreter.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.export.tensorrt.graphs import routes_in
from advmoe_deploy.plan import Plan, Segment
from benchmarks.gpu.common import Part, Record, Work
from benchmarks.gpu.engines import build_one, image_shapes, images_of, set_of

_TURNS, _ROUNDS = 4, 50
_KNOWN: set[str] = set()


def router_tail(work: Work) -> Iterator[Part]:
    """Build each segment that reads images and routes with a plugin, and time it beside the other.

    In fp32: what makes scores, and what is made of them, is fp32 in every set.
    """
    for model in work.models:
        bundle, chosen = set_of(work, model, "fp32")
        for segment in chosen.plan.segments:
            if not _routes(bundle, segment) or [t.name for t in segment.inputs] != ["images"]:
                continue
            name = f"{model} {segment.name}"
            yield f"{name} build", partial(_build, work, model, bundle, segment)
            if not work.engines(model, "fp32").joinpath(f"{segment.name}.plugin.engine").is_file():
                continue
            for batch in work.batches:
                yield f"{name} batch {batch}", partial(_times, work, model, segment, batch)


def _routes(bundle: Bundle, segment: Segment) -> list[Any]:
    plan: Plan = bundle.manifest.plan
    return routes_in(plan, plan.segment(segment.name))


def _build(work: Work, model: str, bundle: Bundle, segment: Segment) -> Record:
    import onnx

    from advmoe_deploy.runtime.tensorrt.cuda import gpu
    from benchmarks.gpu.experiments.router_graph import plugin_of, with_plugins
    from benchmarks.gpu.experiments.router_plugin import register_router
    from benchmarks.gpu.experiments.router_triton import compiled_router

    own, routes = bundle.manifest.plan.segment(segment.name), _routes(bundle, segment)
    for route in routes:
        if plugin_of(route) not in _KNOWN:
            kernel = compiled_router(route, gpu().compute_capability)
            register_router(kernel, plugin_of(route))
            _KNOWN.add(plugin_of(route))
    graph = with_plugins(onnx.load_model(bundle.file(own.file)), routes, segment)
    file = work.baseline(model, f"{segment.name}.plugin", "fp32")
    file.write_bytes(graph.SerializeToString())
    target = work.engines(model, "fp32") / f"{segment.name}.plugin.engine"
    target.unlink(missing_ok=True)
    return build_one(work, file, image_shapes(bundle), "fp32", target, with_plugins=True)


def _times(work: Work, model: str, segment: Segment, batch: int) -> Record:
    """Time both in turn, on the GPU alone, and compare what they answer."""
    from advmoe_deploy.runtime.tensorrt.engine import TensorRtEngine

    inputs, folder = {"images": images_of(work, model, batch)}, work.engines(model, "fp32")
    with (
        TensorRtEngine(folder / f"{segment.name}.engine", contexts=1) as native,
        TensorRtEngine(folder / f"{segment.name}.plugin.engine", contexts=1) as plugin,
    ):
        expected, answer = native.run(inputs), plugin.run(inputs)
        engines = {"native": native, "plugin": plugin}
        ms: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(_TURNS):
            for name, engine in engines.items():
                ms[name] += engine.device_ms(inputs, rounds=_ROUNDS)
    return {
        "max_abs_diff": {
            name: float(np.abs(answer[name].astype(np.float64) - values).max())
            for name, values in expected.items()
        },
        "times": {n: {"p50_ms": float(np.median(each)), "ms": each} for n, each in ms.items()},
        "native / plugin": float(np.median(ms["native"]) / np.median(ms["plugin"])),
    }

"""The stages of ``main.py`` that need TensorRT, or ONNX Runtime, and no PyTorch."""

import time
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from advmoe_deploy.bundle import Bundle, EngineSet, open_bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.plan import Plan
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.tensorrt.runner import DeviceRunner
from advmoe_deploy.specs import Precision
from benchmarks.gpu.common import BATCH, MODELS, Part, Record, Work, ratios_to, summary

BASELINES = ("dense", "unfused")


def build(work: Work) -> Iterator[Part]:
    """Build every engine of every set and of every baseline."""
    for model in work.models:
        for precision in work.precisions:
            for name, (graph, shapes, kind) in _sources(work, model, precision).items():
                target = work.engines(model, precision) / f"{name}.engine"
                yield (
                    f"{model} {precision} {name}",
                    partial(build_one, work, graph, shapes, kind, target),
                )


def _sources(
    work: Work, model: str, precision: Precision
) -> dict[str, tuple[Path, Any, Precision]]:
    """Return by name the graph, the shapes and the precision of every engine of a model."""
    from advmoe_deploy.export.tensorrt.row_graphs import row_graphs
    from advmoe_deploy.runtime.tensorrt.load import graph_files
    from advmoe_deploy.runtime.tensorrt.shapes import shapes_of_segments

    bundle, chosen = set_of(work, model, precision)
    shapes: dict[str, Any] = dict(shapes_of_segments(chosen.plan, BATCH))
    shapes |= {row_graph.name: row_graph.shapes(BATCH) for row_graph in row_graphs(chosen.plan)}
    found = {
        name: (bundle.file(file), shapes[name], chosen.segments.get(name, "fp32"))
        for name, file in graph_files(chosen.plan).items()
    }
    sizes = image_shapes(bundle)
    for name in BASELINES:
        found[name] = work.baseline(model, name, precision), sizes, precision
    return found


def image_shapes(bundle: Bundle) -> dict[str, Any]:
    """Return the shapes that what reads the images is built for."""
    from advmoe_deploy.runtime.tensorrt.shapes import Shapes

    image = bundle.manifest.model.image_shape
    return {"images": Shapes((BATCH.min, *image), (BATCH.opt, *image), (BATCH.max, *image))}


def set_of(work: Work, model: str, precision: Precision) -> tuple[Bundle, EngineSet]:
    """Return the bundle of a model and its set of graphs for TensorRT."""
    bundle = _opened(work.bundle(model))
    chosen = bundle.engine_set("tensorrt", precision)
    if chosen is None:
        raise UsageError(
            f"{model} was not exported at {precision}; run --stages export --again with all of "
            "--precisions"
        )
    return bundle, chosen


@cache
def _opened(bundle: Path) -> Bundle:
    """Return a bundle; gigabytes are hashed once."""
    return open_bundle(bundle)


def build_one(
    work: Work,
    graph: Path,
    shapes: Any,
    precision: Precision,
    target: Path,
    *,
    with_plugins: bool = False,
) -> Record:
    """Build an engine; in a dry run, load its graph into ONNX Runtime and say which it is."""
    from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
    from advmoe_deploy.runtime.tensorrt.build import BuildOptions, build_engine, timing_cache_file
    from advmoe_deploy.runtime.tensorrt.device import this_device

    sizes = {name: (size.min, size.opt, size.max) for name, size in shapes.items()}
    if work.dry:
        OrtEngine(graph).close()
        return {"graph": graph.name, "precision": precision, "shapes": sizes}
    started = time.perf_counter()
    options = BuildOptions(
        batch=BATCH,
        timing_cache=timing_cache_file(this_device()),
        tactic_sources=tactics(),
        optimization_level=work.level,
    )
    engine = build_engine(
        graph.read_bytes(),
        shapes,
        options,
        precision=precision,
        name=target.stem,
        with_plugins=with_plugins,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(engine)
    seconds = round(time.perf_counter() - started, 2)
    return {"seconds": seconds, "bytes": len(engine), "level": work.level}


def tactics() -> tuple[str, ...] | None:
    """Return TensorRT 8.6's own kernels: where it is carried along, cuBLAS and cuDNN are not."""
    from advmoe_deploy.runtime.tensorrt.api import STRONG_TYPES, tensorrt_version

    own = ("JIT_CONVOLUTIONS", "EDGE_MASK_CONVOLUTIONS")
    return own if tensorrt_version() < STRONG_TYPES else None


def open_moe(work: Work, model: str, precision: Precision) -> DeviceRunner:
    """Return the runner of a set."""
    from advmoe_deploy.runtime.tensorrt.load import graph_files

    bundle, chosen = set_of(work, model, precision)
    files = {name: bundle.file(file) for name, file in graph_files(chosen.plan).items()}
    return open_plan(work, model, chosen.plan, files, precision)


def open_plan(
    work: Work,
    model: str,
    plan: Plan,
    graphs: Mapping[str, Path],
    precision: Precision,
) -> DeviceRunner:
    """Return the runner of ``plan`` over the engines of these graphs.

    In a dry run, over the graphs in ONNX Runtime.
    """
    from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
    from advmoe_deploy.runtime.tensorrt.load import runner_of_engines

    shape = MODELS[model].image_shape
    if work.dry:
        return DeviceRunner.over_engines(
            plan,
            graphs,
            shape,
            open_engine=lambda _, graph: OrtEngine(graph),
            batch=BATCH,
            name="onnxruntime",
            precision=precision,
        )
    folder = work.engines(model, precision)
    return runner_of_engines(
        plan,
        {name: folder / f"{name}.engine" for name in graphs},
        shape,
        device=None,
        precision=precision,
    )


def parity(work: Work) -> Iterator[Part]:
    """Compare logits and routes with torch's on the test images."""
    for model in work.models:
        for precision in work.precisions:
            yield f"{model} {precision}", partial(_parity, work, model, precision)


def _parity(work: Work, model: str, precision: Precision) -> Record:
    with open_moe(work, model, precision) as runner:
        return compared(work, model, runner)


def compared(work: Work, model: str, runner: Runner) -> Record:
    """Return how ``runner`` answers the test images, next to torch."""
    with np.load(work.reference(model)) as stored:
        expected = dict(stored)
    answer = runner.infer(_as_float(expected["images"]))
    logits = expected["logits"]
    difference_N = np.abs(answer.logits - logits).max(axis=1)
    relative_N = difference_N / np.maximum(1, np.abs(logits).max(axis=1))
    routes, alike_N = {}, np.ones(len(logits), bool)
    for layer, ids in answer.expert_ids.items():
        chosen_RK = ids.reshape(-1, ids.shape[-1])
        agree_R = (np.sort(chosen_RK) == np.sort(expected[f"{layer}.expert_ids"])).all(axis=1)
        clear_R = expected[f"{layer}.margins"] > 1e-4
        alike_N &= agree_R.reshape(len(logits), -1).all(axis=1)
        routes[layer] = {
            "agreement": float(agree_R.mean()),
            "agreement_of_clear": float(agree_R[clear_R].mean()),
            "smallest_margin": float(expected[f"{layer}.margins"].min()),
        }
    return {
        "images": len(logits),
        "max_abs_logit_diff": float(difference_N.max()),
        "max_abs_logit_diff_routed_alike": float(difference_N[alike_N].max()),
        "max_relative_logit_diff_routed_alike": float(relative_N[alike_N].max()),
        "routed_alike": float(alike_N.mean()),
        "prediction_agreement": float((answer.logits.argmax(1) == logits.argmax(1)).mean()),
        "routes": routes,
    }


def images_of(work: Work, model: str, batch: int) -> np.ndarray:
    """Return as many test images; they repeat where there are fewer."""
    with np.load(work.reference(model)) as stored:
        images = stored["images"]
    return _as_float(np.resize(images, (batch, *images.shape[1:])))


def _as_float(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / np.float32(255)


def onnxruntime(work: Work) -> Iterator[Part]:
    """Compare and time our one graph on ONNX Runtime's providers for GPUs, beside dense.

    In a dry run, on the CPU.
    """
    for model in work.models:
        for engine in ("onnxruntime",) if work.dry else ("onnxruntime-cuda", "onnxruntime-trt"):
            yield f"{model} {engine} parity", partial(_ort_parity, work, model, engine)
            for batch in work.batches:
                yield f"{model} {engine} batch {batch}", partial(_ort, work, model, engine, batch)


def _ort_parity(work: Work, model: str, engine: str) -> Record:
    from advmoe_deploy.runtime.select import open_runner

    with open_runner(_opened(work.bundle(model)), engine) as runner:
        return compared(work, model, runner)


def _ort(work: Work, model: str, engine: str, batch: int) -> Record:
    from advmoe_deploy.profiling.timing import time_interleaved
    from advmoe_deploy.runtime.onnxruntime.graph_runner import GraphRunner
    from advmoe_deploy.runtime.select import PROVIDERS, open_runner

    bundle = _opened(work.bundle(model))
    pixels, shape = images_of(work, model, batch), bundle.manifest.model.image_shape
    dense = bundle.file("baselines/dense.onnx")
    with (
        open_runner(bundle, engine) as moe,
        GraphRunner(dense, shape, provider=PROVIDERS[engine]) as baseline,
    ):
        calls = {"moe": partial(moe.infer, pixels), "dense": partial(baseline.infer, pixels)}
        times = time_interleaved(calls, warmup=5, budget_s=work.seconds)
    return {"times": summary(times), "ratios": ratios_to(times, "dense")}

"""Registry of engines by name, and the choice of a precision for each."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.bundle import FORMATS, MODEL, Bundle, EngineSet
from advmoe_deploy.errors import BundleError, unknown_name
from advmoe_deploy.reports.devices import GpuLibrary
from advmoe_deploy.runtime.engine import Engine, OpenEngine, Source, require_threads
from advmoe_deploy.runtime.onnxruntime.engine import CPU, OrtEngine, Provider
from advmoe_deploy.runtime.onnxruntime.graph_runner import GraphRunner
from advmoe_deploy.runtime.openvino.engine import OpenVinoEngine
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.tensorrt.load import open_tensorrt
from advmoe_deploy.sealing.golden import golden_arrays
from advmoe_deploy.specs import Backend, ComputeDtype, Precision

# Batch sizes run once at load: OpenVINO compiles for each size it meets for the first time.
WARM_BATCHES = (1, 2, 4, 8, 16, 32, 64)


# Of bundles that do not record what they were made for.
_USUAL = "onnxruntime"


def engine_for(bundle: Bundle, engine: str | None, note: Callable[[str], None]) -> str:
    """Return ``engine``, or without one what ``bundle`` was made for.

    Where the bundle does not record that, it is onnxruntime, and ``note`` is told so.
    """
    if engine is not None:
        return engine
    if bundle.manifest.made_for is not None:
        return own_engine(bundle)
    name, precision = resolved(bundle, _USUAL)
    note(
        f"{bundle.path} does not record what engine it was made for: it runs on {name} in "
        f"{precision}; --engine chooses another"
    )
    return name


def own_engine(bundle: Bundle) -> str:
    """Return the engine that ``bundle`` was made for; onnxruntime if it does not record one."""
    return bundle.manifest.made_for or _USUAL


def resolved(bundle: Bundle, engine: str) -> tuple[str, Precision]:
    """Return the name and the precision that ``engine`` stands for with ``bundle``.

    Raises:
        UsageError: no engine or precision has that name.
    """
    name, precision = parse_engine(engine)
    if precision is not None:
        return name, precision
    backend = backend_of(name)
    # What ONNX Runtime was given in int8 was made for, and examined on, a CPU.
    elsewhere = name in ON_GPU and backend == "onnxruntime"
    return name, "fp32" if elsewhere else _own_precision(bundle, backend)


def open_runner(bundle: Bundle, engine: str | None = None, *, threads: int = 0) -> Runner:
    """Return a runner for ``bundle``; use it as a context manager.

    Args:
        bundle: an opened, so verified, bundle.
        engine: a name from :data:`ENGINES`, or ``NAME:PRECISION``; by default the one that the
            bundle was made for. Without a precision, the one that it was exported at where it was
            exported for that engine, else fp32.
        threads: of the engine; 0 is :func:`~advmoe_deploy.process.default_threads`.

    Raises:
        UsageError: no engine or precision has that name, or ``threads`` is negative.
        BundleError: the bundle was not exported for that engine at that precision.
        BackendUnavailableError: the engine's package is not installed, or the CPU lacks the
            precision.
    """
    name, precision = resolved(bundle, engine or own_engine(bundle))
    require_threads(threads)
    return ENGINES[name](bundle, precision, threads)


def backend_of(name: str) -> Backend:
    """Return whose runtime the engine called ``name`` is."""
    found = [backend for backend in get_args(Backend) if name.startswith(backend)]
    if not found:
        raise unknown_name("engine", name, ENGINES)
    return cast("Backend", max(found, key=len))


def parse_engine(engine: str) -> tuple[str, Precision | None]:
    """Return the name and the precision, if any, of ``NAME`` or ``NAME:PRECISION``.

    Raises:
        UsageError: one of them is unknown.
    """
    name, colon, precision = engine.partition(":")
    if name not in ENGINES:
        raise unknown_name("engine", name, ENGINES)
    for known in get_args(Precision):
        if precision == known:
            return name, known
    if colon:
        raise unknown_name("precision", precision, get_args(Precision))
    return name, None


def _own_precision(bundle: Bundle, backend: Backend) -> Precision:
    precision = bundle.manifest.precision
    return precision if bundle.engine_set(backend, precision) else "fp32"


def _ort_graph(
    bundle: Bundle, precision: Precision, threads: int, name: str = "onnxruntime"
) -> Runner:
    provider = PROVIDERS[name]
    if precision != "fp32":
        return _set_runner(bundle, "onnxruntime", precision, threads, name, provider)
    manifest = bundle.manifest
    shape, routes = manifest.model.image_shape, manifest.plan.routes
    return GraphRunner(
        bundle.graph(MODEL), shape, routes=routes, threads=threads, provider=provider, name=name
    )


def _ort_plan(bundle: Bundle, precision: Precision, threads: int) -> Runner:
    return _plan_runner(bundle, "onnxruntime", precision, threads)


def _openvino_graph(bundle: Bundle, precision: Precision, threads: int) -> Runner:
    runner = _set_runner(bundle, "openvino", precision, threads)
    return _warm(bundle, runner, runner.infer)


def _openvino_plan(bundle: Bundle, precision: Precision, threads: int) -> Runner:
    runner = _plan_runner(bundle, "openvino", precision, threads)
    return _warm(bundle, runner, runner.infer)


def _tensorrt(
    bundle: Bundle, precision: Precision, threads: int, library: GpuLibrary = "tensorrt"
) -> Runner:
    """Return a runner of engines built for this GPU; ``threads`` of the host are not theirs."""
    runner = open_tensorrt(bundle, _require_set(bundle, library, precision))
    # What is met twice becomes a CUDA graph.
    return _warm(bundle, runner, runner.prepare, rounds=2)


def _plan_runner(bundle: Bundle, backend: Backend, precision: Precision, threads: int) -> Runner:
    """Return a runner of the bundle's own plan, one engine per segment."""
    plan = bundle.manifest.plan
    files = {s.name: bundle.graph(s.file) for s in plan.segments}
    compute_dtypes: dict[str, ComputeDtype] = {}
    if precision != "fp32":
        chosen = _require_set(bundle, backend, precision)
        files |= {name: bundle.graph(file) for name, file in chosen.files.items()}
        compute_dtypes = compute_dtypes_of(chosen.segments)
    return PlanRunner(
        plan,
        files,
        bundle.manifest.model.image_shape,
        open_engine=engine_opener(backend, compute_dtypes, threads),
        name=f"{backend}-plan",
        precision=precision,
    )


def _set_runner(
    bundle: Bundle,
    backend: Backend,
    precision: Precision,
    threads: int,
    name: str | None = None,
    provider: Provider = CPU,
) -> Runner:
    """Return a runner of the few graphs that were written for this backend and precision."""
    chosen = _require_set(bundle, backend, precision)
    return PlanRunner(
        chosen.plan,
        {s.name: bundle.graph(s.file) for s in chosen.plan.segments},
        bundle.manifest.model.image_shape,
        routes=bundle.manifest.plan.routes,
        open_engine=engine_opener(backend, chosen.compute_dtypes, threads, provider),
        name=name or backend,
        precision=precision,
    )


def engine_opener(
    backend: Backend,
    compute_dtypes: Mapping[str, ComputeDtype],
    threads: int = 0,
    provider: Provider = CPU,
) -> OpenEngine:
    """Return what opens segments with ``backend``; those not in ``compute_dtypes`` run in fp32."""
    if backend == "onnxruntime":
        return lambda _, graph: OrtEngine(graph, threads=threads, provider=provider)

    def open_openvino(name: str, graph: Source) -> Engine:
        return OpenVinoEngine(
            graph, compute_dtype=compute_dtypes.get(name, "fp32"), threads=threads
        )

    return open_openvino


def compute_dtypes_of(segments: Mapping[str, Precision]) -> dict[str, ComputeDtype]:
    """Return what each segment computes in, quantised parts aside.

    Around int8 that is bf16 where another segment takes it, so that both can share a graph.
    """
    around: ComputeDtype = "bf16" if "bf16" in segments.values() else "fp32"
    return {name: around if kind == "int8" else kind for name, kind in segments.items()}


def _require_set(bundle: Bundle, backend: Backend, precision: Precision) -> EngineSet:
    chosen = bundle.engine_set(backend, precision)
    if chosen is None:
        raise BundleError(
            f"{bundle.path} was not exported for {backend} at {precision}; export it with "
            f"--format {FORMATS[backend]} --precision {precision}"
        )
    return chosen


def _warm(
    bundle: Bundle,
    runner: Runner,
    run: Callable[[NDArray[np.float32]], object],
    rounds: int = 1,
) -> Runner:
    """Run the golden images at the usual batch sizes, so that few requests wait for compilation.

    An expert is compiled for the numbers of rows it gets thereby; another split of a batch may
    still meet a new one.
    """
    with ExitStack() as stack:
        stack.enter_context(runner)
        images = golden_arrays(bundle)["images"]
        for batch in WARM_BATCHES * rounds:
            run(np.resize(images, (batch, *images.shape[1:])))
        stack.pop_all()  # it stays open, unless something went wrong
    return runner


PROVIDERS: dict[str, Provider] = {
    "onnxruntime": CPU,
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-trt": "TensorrtExecutionProvider",
}
ENGINES: dict[str, Callable[[Bundle, Precision, int], Runner]] = {
    "onnxruntime": _ort_graph,
    "onnxruntime-plan": _ort_plan,
    "onnxruntime-cuda": partial(_ort_graph, name="onnxruntime-cuda"),
    "onnxruntime-trt": partial(_ort_graph, name="onnxruntime-trt"),
    "openvino": _openvino_graph,
    "openvino-plan": _openvino_plan,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": partial(_tensorrt, library="tensorrt-rtx"),
}
# Those that need a GPU.
ON_GPU = ("onnxruntime-cuda", "onnxruntime-trt", "tensorrt", "tensorrt-rtx")

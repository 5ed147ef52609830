"""Engines by name."""

from collections.abc import Callable

from advmoe_deploy.bundle import MODEL, Bundle
from advmoe_deploy.errors import unknown_name
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.runtime.runner import GraphRunner, Runner


def open_runner(bundle: Bundle, engine: str = "onnxruntime", *, threads: int = 0) -> Runner:
    """Return a runner for ``bundle``; use it as a context manager.

    Args:
        bundle: an opened, so verified, bundle.
        engine: a name from :data:`ENGINES`.
        threads: inside one operator; 0 lets the engine choose.

    Raises:
        UsageError: no engine has that name, or ``threads`` is negative.
        BackendUnavailableError: the engine's package is not installed.
    """
    if engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    return ENGINES[engine](bundle, threads)


def _graph_runner(bundle: Bundle, threads: int) -> Runner:
    manifest = bundle.manifest
    shape, routes = manifest.model.image_shape, manifest.plan.routes
    return GraphRunner(bundle.file(MODEL), shape, routes=routes, threads=threads)


def _plan_runner(bundle: Bundle, threads: int) -> Runner:
    manifest = bundle.manifest
    files = {s.name: bundle.file(s.file) for s in manifest.plan.segments}
    return PlanRunner(manifest.plan, files, manifest.model.image_shape, threads=threads)


ENGINES: dict[str, Callable[[Bundle, int], Runner]] = {
    "onnxruntime": _graph_runner,
    "onnxruntime-plan": _plan_runner,
}

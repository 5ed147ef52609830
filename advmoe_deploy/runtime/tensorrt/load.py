"""Loader of a TensorRT engine set: tensors stay on the GPU, only ids and answers cross.

Written against the documented interface; not run on a GPU yet.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import PurePosixPath

from advmoe_deploy.bundle import Bundle, EngineSet
from advmoe_deploy.errors import BackendUnavailableError, BundleError
from advmoe_deploy.plan import ExpertsStep, Plan, RunStep
from advmoe_deploy.reports.devices import Device
from advmoe_deploy.runtime.engine import Source
from advmoe_deploy.runtime.tensorrt.layout import Layout, grouped_name, positions_name
from advmoe_deploy.runtime.tensorrt.program import Program
from advmoe_deploy.runtime.tensorrt.rows import (
    ALL_ROWS,
    GROUPED,
    OWN_ROWS,
    POSITIONS,
    ROWS,
    combine_name,
    dispatch_name,
    is_read_later,
    rows_per_image,
)
from advmoe_deploy.runtime.tensorrt.runner import DeviceRunner
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile
from advmoe_deploy.runtime.tensorrt.slot import Stored, TensorRtSlot
from advmoe_deploy.specs import Precision

# Batches that may be under way at once: while one waits for its ids, the other computes.
_SLOTS = 2


def open_tensorrt(bundle: Bundle, engines: EngineSet) -> DeviceRunner:
    """Return a runner of what was exported for this GPU.

    Args:
        bundle: an opened, so verified, bundle.
        engines: its set of TensorRT engines.

    Raises:
        BackendUnavailableError: TensorRT or a GPU is missing, or engines were built for another.
        BundleError: the bundle lacks an engine, or TensorRT cannot read it.
        MachineError: memory is used up.
    """
    device = engines.device
    if device is None:
        raise BackendUnavailableError(
            f"{bundle.path} holds TensorRT's graphs, not its engines; export it with --format trt "
            "on the machine that is to run it"
        )
    return runner_of_engines(
        engines.plan,
        {name: bundle.sealed(file) for name, file in graph_files(engines.plan).items()},
        bundle.manifest.model.image_shape,
        device=device,
        precision=engines.precision,
    )


def runner_of_engines(
    plan: Plan,
    sources: Mapping[str, Source],
    image_shape: tuple[int, int, int],
    *,
    device: Device | None,
    precision: Precision,
) -> DeviceRunner:
    """Return a runner of engines, those that move rows included, by name.

    The rest is as for :func:`open_tensorrt`; ``device`` is what they were built for, where that is
    known.
    """
    with ExitStack() as stack:
        programs = {
            name: stack.enter_context(Program(source, device=device))
            for name, source in sources.items()
        }
        layout = Layout(plan, _batch_of(plan, programs))
        stored = _stored(layout, programs)
        streams = 1 + max((len(step.segments) for step in _layers(plan)), default=0)
        made = [stack.enter_context(TensorRtSlot(programs, stored, streams)) for _ in range(_SLOTS)]
        return DeviceRunner(
            layout,
            made,
            image_shape,
            name=device.library if device is not None else "tensorrt",
            precision=precision,
            tf32=device is not None and device.tf32,
            resources=stack.pop_all(),
        )


def graph_files(plan: Plan) -> dict[str, str]:
    """Return the file of every graph of a set: those of its plan, and those that move rows."""
    files = {segment.name: segment.file for segment in plan.segments}
    first = PurePosixPath(plan.segments[0].file)
    for step in _layers(plan):
        names = [dispatch_name(step)]
        names += [combine_name(step)] if is_read_later(plan, step.output) else []
        files |= {name: str(first.with_name(f"{name}{first.suffix}")) for name in names}
    return files


def users(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Return which tensor of a slot each graph calls by which name, those that make it first."""
    for step in plan.steps:
        if isinstance(step, RunStep):
            segment = plan.segment(step.segment)
            ends = [*segment.outputs, *segment.inputs]
            yield from ((end.name, segment.name, end.name) for end in ends)
        elif isinstance(step, ExpertsStep):
            yield from _users_of_layer(plan, step)


def _users_of_layer(plan: Plan, step: ExpertsStep) -> Iterator[tuple[str, str, str]]:
    gather, combine = dispatch_name(step), combine_name(step)
    for name in step.segments:
        (given,), (answer,) = plan.segment(name).inputs, plan.segment(name).outputs
        yield grouped_name(step), name, answer.name
        yield f"{name}.{OWN_ROWS}", gather, OWN_ROWS
        yield f"{name}.{OWN_ROWS}", name, given.name
        yield f"{name}.{ROWS}", gather, ROWS
        yield step.input, name, given.name
    yield step.input, gather, ALL_ROWS
    if is_read_later(plan, step.output):
        yield step.output, combine, step.output
        yield grouped_name(step), combine, GROUPED
        yield positions_name(step), combine, POSITIONS
        route = plan.route(step.layer)
        if route.weighting != "one":
            yield route.weights, combine, route.weights


def _layers(plan: Plan) -> Sequence[ExpertsStep]:
    return [step for step in plan.steps if isinstance(step, ExpertsStep)]


def _batch_of(plan: Plan, programs: Mapping[str, Program]) -> BatchProfile:
    """Return the batches that every engine which reads a whole batch takes."""
    least, most = 1, None
    for step in plan.steps:
        if isinstance(step, RunStep):
            for name, facts in programs[step.segment].inputs.items():
                factor = rows_per_image(plan, name)
                least = max(least, facts.least[0] // factor)
                most = min(most or facts.shape[0], facts.shape[0] // factor)
    return BatchProfile(min=least, opt=most or least, max=most or least)


def _stored(layout: Layout, programs: Mapping[str, Program]) -> dict[str, Stored]:
    """Return what an execution slot has to hold, as the engines declare it.

    Raises:
        BundleError: one engine takes another type or shape than the other makes.
    """
    stored: dict[str, Stored] = {}
    for name, graph, called in users(layout.plan):
        if called not in programs[graph].tensors:
            raise BundleError(f"{programs[graph].name} has no {called}; export the bundle again")
        facts = programs[graph].tensors[called]
        there = Stored(facts.dtype, layout.capacity[name], facts.shape[1:])
        if stored.setdefault(name, there) != there:
            raise BundleError(
                f"{programs[graph].name} takes {called} as {there.dtype} {there.rest}, and it is "
                f"made as {stored[name].dtype} {stored[name].rest}; export the bundle again"
            )
    return stored

"""Memory layout of a plan's tensors on engines that have a memory of their own."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, Segment, TensorInfo
from advmoe_deploy.runtime.tensorrt.rows import (
    GROUPED,
    OWN_ROWS,
    POSITIONS,
    ROWS,
    is_read_later,
    region_rows,
    rows_per_image,
)
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile
from advmoe_deploy.runtime.tensorrt.slots import View


@dataclass(frozen=True)
class Layer:
    """A layer of experts.

    ``regions`` has by expert the number of its region, of ``rows_each`` rows, and its segment.
    """

    step: ExpertsStep
    route: RouteStep
    segments: dict[str, Segment]
    regions: dict[int, tuple[int, str]]
    rows_each: int
    is_read_later: bool

    def answer(self, region: int, rows: int) -> View:
        """Return the first rows of a region."""
        return View(grouped_name(self.step), rows, region * self.rows_each)


@dataclass(frozen=True)
class Layout:
    """Layout of the tensors of ``plan``, and how many images there may be."""

    plan: Plan
    batch: BatchProfile

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The plan's tensors by name."""
        return self.plan.tensors()

    @cached_property
    def factors(self) -> dict[str, int]:
        """Number of rows of each tensor that belong to an image."""
        return {name: rows_per_image(self.plan, name) for name in self.tensors}

    @cached_property
    def routes(self) -> tuple[RouteStep, ...]:
        """The plan's routing points."""
        return self.plan.routes

    @cached_property
    def ends(self) -> dict[str, tuple[list[str], list[str]]]:
        """The names of the inputs and of the outputs of each segment."""
        return {
            segment.name: ([t.name for t in segment.inputs], [t.name for t in segment.outputs])
            for segment in self.plan.segments
        }

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The layers of experts by the name of their output."""
        steps = [step for step in self.plan.steps if isinstance(step, ExpertsStep)]
        return {step.output: self._layer(step) for step in steps}

    @cached_property
    def capacity(self) -> dict[str, int]:
        """The rows of every tensor that an execution slot of this plan holds."""
        rows = {name: self.rows(name, self.batch.max) for name in self.tensors}
        for layer in self.layers.values():
            rows[grouped_name(layer.step)] = len(layer.regions) * layer.rows_each
            top_k = layer.route.top_k
            rows[positions_name(layer.step)] = rows[layer.step.output] * top_k
            for name in layer.step.segments:
                rows[f"{name}.{ROWS}"] = rows[f"{name}.{OWN_ROWS}"] = rows[layer.step.input]
        return rows

    def rows(self, tensor: str, images: int) -> int:
        """Return the rows of ``tensor`` that belong to as many images."""
        return images * self.factors[tensor]

    def _layer(self, step: ExpertsStep) -> Layer:
        values = prod(int(size) for size in self.tensors[step.output].shape[1:])
        route = self.plan.route(step.layer)
        experts = enumerate(zip(route.kept, step.segments, strict=True))
        return Layer(
            step=step,
            route=route,
            segments={name: self.plan.segment(name) for name in step.segments},
            regions={expert: (region, name) for region, (expert, name) in experts},
            rows_each=region_rows(self.rows(step.output, self.batch.max), values),
            is_read_later=is_read_later(self.plan, step.output),
        )


def grouped_name(step: ExpertsStep) -> str:
    """Return the name of the tensor that a layer's experts answer into, a region each."""
    return f"{step.output}.{GROUPED}"


def positions_name(step: ExpertsStep) -> str:
    """Return the name of the tensor that says where in it each choice's answer is."""
    return f"{step.output}.{POSITIONS}"

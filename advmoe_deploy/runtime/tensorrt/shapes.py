"""Input shapes that engines are built for: least, best and largest, from batch sizes.

A size of the plan follows the batch as images (``N``), as tokens of all images (``16*N``) or as the
rows that an expert is given (``R``): any number of the routed rows, a balanced share at best.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator
from typing_extensions import Self

from advmoe_deploy.errors import UsageError
from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, TensorInfo
from advmoe_deploy.specs import Frozen


class BatchProfile(Frozen):
    """Batch sizes an engine is built for; ``opt`` is the one it is fastest at.

    Sizes that are not given follow from those that are: 1, 64 and 1024, or the nearest that grow.
    """

    min: int = Field(1, ge=1)
    opt: int = Field(64, ge=1)
    max: int = Field(1024, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, given: Any) -> Any:
        sizes = {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else {}
        if not sizes or not all(isinstance(size, int) for size in sizes.values()):
            return given
        low = sizes.get("min", min(1, *sizes.values()))
        high = sizes.get("max", max(1024, *sizes.values()))
        return {"min": low, "opt": min(max(64, low), high), "max": high, **sizes}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"batch sizes must grow: min={self.min} opt={self.opt} max={self.max}")
        return self


Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """The least, the best and the largest shape of one input."""

    min: Sizes
    opt: Sizes
    max: Sizes


def with_least(shapes: Mapping[str, Shapes]) -> list[Mapping[str, Shapes]]:
    """Return the shapes of each optimization profile of an engine whose inputs are of ``shapes``.

    Kernels are chosen for the best shapes. The second profile is for exactly the least ones, a
    single image or row unless larger batches are the least, so that these get kernels of their own.
    """
    if all(each.opt == each.min for each in shapes.values()):
        return [shapes]
    return [shapes, {name: Shapes(each.min, each.min, each.min) for name, each in shapes.items()}]


def narrowest(
    profiles: Sequence[Mapping[str, tuple[Sizes, Sizes]]], shapes: Mapping[str, Sizes]
) -> int:
    """Return the number of the last profile that takes inputs of ``shapes``, 0 if none does.

    ``profiles`` have the least and the largest shape of each input.
    """

    def takes(ends: Mapping[str, tuple[Sizes, Sizes]]) -> bool:
        return all(
            low <= size <= high
            for name, (least, most) in ends.items()
            for low, size, high in zip(least, shapes[name], most, strict=True)
        )

    return max((number for number, ends in enumerate(profiles) if takes(ends)), default=0)


def shapes_of_segments(plan: Plan, batch: BatchProfile) -> dict[str, dict[str, Shapes]]:
    """Return the shapes of every input of every segment, by segment and by input."""
    rows = _rows_of_experts(plan, batch)
    return {
        segment.name: {
            tensor.name: shapes_of(tensor, batch, rows.get(segment.name))
            for tensor in segment.inputs
        }
        for segment in plan.segments
    }


def _rows_of_experts(plan: Plan, batch: BatchProfile) -> Mapping[str, BatchProfile]:
    layers = [step for step in plan.steps if isinstance(step, ExpertsStep)]
    return {
        name: rows_profile(plan.route(step.layer), len(step.segments), batch)
        for step in layers
        for name in step.segments
    }


def rows_profile(route: RouteStep, experts: int, batch: BatchProfile) -> BatchProfile:
    """Return how many rows each of ``experts`` is built for.

    A row goes to an expert once at most, so all rows are the most that one can get.
    """
    tokens = route.tokens or 1
    share = -(-batch.opt * tokens * route.top_k // experts)
    return BatchProfile(min=1, opt=min(share, batch.max * tokens), max=batch.max * tokens)


def shapes_of(tensor: TensorInfo, batch: BatchProfile, rows: BatchProfile | None = None) -> Shapes:
    """Return the shapes of ``tensor``; ``rows`` are those of the expert that it is given to."""
    given = rows if rows is not None else batch

    def at(images: int, of_expert: int) -> Sizes:
        return tuple(_size(each, images, of_expert) for each in tensor.shape)

    return Shapes(at(batch.min, given.min), at(batch.opt, given.opt), at(batch.max, given.max))


def _size(size: int | str, images: int, of_expert: int) -> int:
    if isinstance(size, int):
        return size
    if size == "R":
        return of_expert
    factor, _, name = size.rpartition("*")
    if name != "N" or not (factor.isdecimal() or not factor):
        raise UsageError(f"a size of {size!r} follows no batch; it is N, 16*N or R")
    return int(factor or 1) * images

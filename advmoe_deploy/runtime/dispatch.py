"""The bookkeeping of dispatch: which rows go to which expert, and where their answers lie.

Plain functions of a plan and of ids, for runners whose engines have a memory of their own.

Shapes: N images, T tokens per image, R rows of one expert, E experts, K experts per row,
S = N * T * K choices.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.errors import UsageError
from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, RunStep

# What the graphs that move rows read and make; see ``export.movers``.
ALL_ROWS = "all_rows"
OWN_ROWS = "own_rows"
ROWS = "rows"
GROUPED = "grouped"
POSITIONS = "positions"

# CUDA wants tensors to start at multiples of this many bytes; the smallest element has two.
_ALIGNMENT, _SMALLEST = 256, 2
# With more experts, computing all of them would cost more than the wait for the ids.
MOST_AT_ONCE = 4


def dispatch_name(step: ExpertsStep) -> str:
    """Return the name of the graph that gathers an expert's rows."""
    return f"{step.output}.dispatch"


def combine_name(step: ExpertsStep) -> str:
    """Return the name of the graph that puts a layer's answers back in order."""
    return f"{step.output}.combine"


def is_read_later(plan: Plan, tensor: str) -> bool:
    """Return whether a segment reads ``tensor``."""
    read = set()
    for step in plan.steps:
        if isinstance(step, RunStep):
            read |= {given.name for given in plan.segment(step.segment).inputs}
        elif isinstance(step, ExpertsStep):
            read.add(step.input)
    return tensor in read


def rows_per_image(plan: Plan, tensor: str) -> int:
    """Return how many rows of ``tensor`` belong to one image: 1, or tokens."""
    rows = str(plan.tensors()[tensor].shape[0])
    return int(rows.removesuffix("*N")) if "*" in rows else 1


def bucket(rows: int, largest: int) -> int:
    """Return the number of rows to run instead of ``rows``, at most an eighth more.

    Few sizes, so that what is prepared for one (a context, a CUDA graph) is met again.
    """
    step = max(1, (1 << (rows.bit_length() - 1)) >> 3)
    return min(-(-rows // step) * step, largest)


def region_rows(rows: int, values_per_row: int) -> int:
    """Return how many rows to reserve for ``rows``, so that what follows them is aligned.

    A row is ``values_per_row`` elements of at least two bytes.
    """
    unit = _ALIGNMENT // math.gcd(_ALIGNMENT, _SMALLEST * values_per_row)
    return -(-rows // unit) * unit


def padded(values: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return ``values`` followed by zeros, which name a row that is always there."""
    result = np.zeros(size, np.int64)
    result[: len(values)] = values
    return result


@dataclass(frozen=True)
class Dispatch:
    """By expert that was chosen at all: its choices, ascending, as places in ids [S]."""

    choices: dict[int, NDArray[np.int64]]
    top_k: int

    @property
    def only(self) -> int | None:
        """The expert that takes every row, if there is one."""
        return next(iter(self.choices)) if len(self.choices) == 1 else None

    def rows(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Return each chosen expert and the numbers of its rows."""
        for expert, choices in self.choices.items():
            yield expert, choices // self.top_k

    def positions(self, starts: Mapping[int, int]) -> NDArray[np.int64]:
        """Return where each choice's answer lies, [S]; ``starts`` has each expert's first row."""
        result = np.empty(sum(map(len, self.choices.values())), np.int64)
        for expert, choices in self.choices.items():
            result[choices] = starts[expert] + np.arange(len(choices))
        return result


def dispatch(ids_RK: NDArray[np.int64]) -> Dispatch:
    """Return who gets which rows; ``ids_RK`` may have more axes before the last."""
    ids_S = ids_RK.reshape(-1)
    if len(ids_S) == 1:  # the usual case of one image should cost next to nothing
        return Dispatch({int(ids_S[0]): np.zeros(1, np.int64)}, 1)
    experts = np.flatnonzero(np.bincount(ids_S))
    return Dispatch({int(e): np.flatnonzero(ids_S == e) for e in experts}, ids_RK.shape[-1])


def combined(
    route: RouteStep,
    given: Dispatch,
    parts: Mapping[int, NDArray[np.float32]],
    weights_RK: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return the answers in the rows' order, weighted and summed where ``route`` says so.

    ``parts`` has each chosen expert's answers, a row per choice, in their order.
    """
    first = next(iter(parts.values()))
    if given.only is not None and route.weighting == "one":
        return first
    total = sum(map(len, given.choices.values()))
    each = np.empty((total, *first.shape[1:]), first.dtype)
    for expert, choices in given.choices.items():
        each[choices] = parts[expert]
    if route.weighting == "one":
        return each
    rest = first.shape[1:]
    beside = weights_RK.reshape(-1, route.top_k, *([1] * len(rest)))
    answer: NDArray[np.float32] = (each.reshape(-1, route.top_k, *rest) * beside).sum(axis=1)
    return answer


def at_once_step(plan: Plan) -> ExpertsStep | None:
    """Return the only layer of ``plan`` if its experts can run before the routes are known.

    That is so where few experts read the images themselves, and nothing follows them.
    """
    layers = [step for step in plan.steps if isinstance(step, ExpertsStep)]
    if len(layers) != 1 or len(layers[0].segments) > MOST_AT_ONCE:
        return None
    (layer,) = layers
    ready = layer.input in plan.inputs and not is_read_later(plan, layer.output)
    return layer if ready and plan.route(layer.layer).weighting == "one" else None


def fitting_batch(
    given: Mapping[str, int], least: Mapping[str, int], most: Mapping[str, int]
) -> tuple[int, int]:
    """Return the number of rows that inputs have in common, and how many to run instead.

    Inputs may have multiples of it, as tokens are of images; without a common number it is 1.

    Args:
        given: the rows of each input.
        least: the rows that the engine takes at least.
        most: the rows that it takes at most.

    Raises:
        UsageError: an input has no rows, or more than the engine takes.
    """
    for name, rows in given.items():
        if not 1 <= rows <= most[name]:
            raise UsageError(
                f"{name} has {rows} rows, and the engine was built for 1 to {most[name]}; split "
                "the batch, or export with a larger one"
            )
    common = min(given.values())
    if any(rows % common for rows in given.values()):
        return 1, 1
    factors = {name: rows // common for name, rows in given.items()}
    largest = min(most[name] // factor for name, factor in factors.items())
    smallest = max(-(-least[name] // factor) for name, factor in factors.items())
    return common, min(max(bucket(common, largest), smallest), largest)

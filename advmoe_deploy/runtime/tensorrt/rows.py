"""Row counts and names of the graphs that gather an expert's rows and scatter its answers.

Shapes: N images, T tokens per image, R rows of one expert, E experts, K experts per row.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.errors import UsageError
from advmoe_deploy.plan import ExpertsStep, Plan, RunStep

# CUDA wants tensors to start at multiples of this many bytes; the smallest element has two.
_ALIGNMENT, _SMALLEST = 256, 2

# Tensors of the gather and scatter graphs, see ``export/tensorrt/row_graphs.py``.
ALL_ROWS = "all_rows"
OWN_ROWS = "own_rows"
ROWS = "rows"
GROUPED = "grouped"
POSITIONS = "positions"


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

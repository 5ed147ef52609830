"""Tolerances of parity: as near as float32 allows, and the same experts.

Shapes: N rows of whatever shape, K experts per row.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.errors import CheckFailedError

LOGIT_TOLERANCE = 1e-5
# How far an image's logits may move in a lower precision, relative to their norm. On CPUs without
# VNNI the kernel of int8, and with it a step here and there, depends on the batch's size.
LOSSY_ROW = 0.1

_ROUNDINGS = 8.0
# Units in the last place of the largest value: an output that was exact may get that far off.
_LAST_PLACES = 8
_LARGEST_TOLERANCE = 1e-3


def row_differences(
    answer: NDArray[Any], expected: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each row's largest difference, as it is and relative to the row, both float64 [N].

    Relative means divided by the row's largest expected value where that exceeds 1: a float32 keeps
    seven digits, so of a logit of 20 the last bit alone is 2e-6. NaN or infinity on either side
    gives NaN or infinity.
    """
    rest = tuple(range(1, expected.ndim))
    with np.errstate(invalid="ignore"):
        absolute_N = np.abs(answer.astype(np.float64) - expected).max(axis=rest)
        return absolute_N, absolute_N / np.maximum(1.0, np.abs(expected).max(axis=rest))


def relative_distances(
    answer_NC: NDArray[np.float32], expected_NC: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return each row's distance from the expected one, relative to the norm of that."""
    with np.errstate(invalid="ignore", over="ignore"):
        expected = expected_NC.astype(np.float64)
        distance_N = np.linalg.norm(answer_NC - expected, axis=1)
        return np.asarray(distance_N / np.maximum(np.linalg.norm(expected, axis=1), 1e-12))


def rounding_of(answer: NDArray[Any], exact: NDArray[Any]) -> float:
    """Return how far float32 took a torch model from itself in float64, relative as above."""
    return float(row_differences(answer, exact)[1].max(initial=0.0))


def tolerance_for(rounding: float) -> float:
    """Return what may differ where the torch model itself is uncertain by ``rounding``.

    That is 1e-5, or eight times the rounding where a model magnifies the last bits of a float32
    (depth, BatchNorm over next to nothing); never more than 1e-3.
    """
    return float(np.clip(_ROUNDINGS * rounding, LOGIT_TOLERANCE, _LARGEST_TOLERANCE))


def margin_for(scores: float, *, least: float) -> float:
    """Return how near the best scores are where rounding may swap them: ``scores`` is one's own."""
    return max(least, _ROUNDINGS * scores)


def error_of(answer: NDArray[Any], exact: NDArray[Any]) -> float:
    """Return the largest distance of ``answer`` from ``exact``; NaN where either has one."""
    with np.errstate(invalid="ignore"):
        return float(np.abs(answer.astype(np.float64) - exact).max(initial=0.0))


def pass_limit(before: NDArray[Any], exact: NDArray[Any]) -> float:
    """Return how far from ``exact`` a graph pass may leave an output that was ``before``.

    That is eight times as far as it was, or the last bits of its largest value.
    """
    largest = np.abs(exact).max(initial=0.0)
    return max(
        _ROUNDINGS * error_of(before, exact), _LAST_PLACES * float(np.spacing(np.float32(largest)))
    )


def require_near(answer: NDArray[Any], expected: NDArray[Any], rounding: float, what: str) -> None:
    """Raise :class:`CheckFailedError` if a row of ``answer`` is further off than the tolerance."""
    difference = float(row_differences(answer, expected)[1].max())
    limit = tolerance_for(rounding)
    if not difference <= limit:
        raise CheckFailedError(
            f"{what} differs from the torch model by {difference:.3g} (limit {limit:.3g}, relative "
            "to values above 1); no bundle was written"
        )


def same_experts(expected: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which rows [R] have the same experts, in whatever order."""
    ids_RK = ids.reshape(expected.shape)
    return np.asarray((np.sort(expected, axis=1) == np.sort(ids_RK, axis=1)).all(axis=1))

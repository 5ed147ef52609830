"""Routing on the host: scores to ids and weights, by the rule of a plan's step.

Shapes: R rows (images or tokens), E experts, K experts per row.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.plan import RENORMALISER, RouteStep

Tensors = dict[str, NDArray[Any]]


def route(step: RouteStep, scores_RE: NDArray[np.float32]) -> Tensors:
    """Return ids, best first, and weights by the rule of ``step``; ties to the lowest index."""
    if step.top_k == 1:
        ids_RK = scores_RE.argmax(axis=1)[:, None].astype(np.int64)
    else:
        descending_RE = np.where(np.isnan(scores_RE), -np.inf, -scores_RE)  # NaN first, as argmax
        ids_RK = np.argsort(descending_RE, axis=1, kind="stable")[:, : step.top_k].astype(np.int64)
    shape = (-1, *(int(size) for size in step.shape[1:]))
    weights_RK = weights_of(step, scores_RE, ids_RK)
    if step.experts is not None:
        ids_RK = np.array(step.experts)[ids_RK]
    return {step.expert_ids: ids_RK.reshape(shape), step.weights: weights_RK.reshape(shape)}


def share_margins(scores_RE: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return by how much the largest softmax exceeds the second [R]; not finite where none is.

    Of one score a row there is no second, and nothing is returned.
    """
    if scores_RE.shape[1] < 2:
        return np.zeros(0, np.float32)
    with np.errstate(invalid="ignore"):
        powers_RE = np.exp(scores_RE - scores_RE.max(axis=1, keepdims=True))
        ordered_RE = np.partition(powers_RE, -2, axis=1)  # so that the last two are the largest
        lead_R = ordered_RE[:, -1] - ordered_RE[:, -2]
        margins_R: NDArray[np.float32] = lead_R / powers_RE.sum(axis=1)
    return margins_R


def softmax(scores_RE: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the shares [R, E]; not finite where the scores of a row are not."""
    with np.errstate(invalid="ignore"):
        powers_RE = np.exp(scores_RE.astype(np.float64) - scores_RE.max(axis=1, keepdims=True))
        return np.asarray(powers_RE / powers_RE.sum(axis=1, keepdims=True))


def weights_of(
    step: RouteStep, scores_RE: NDArray[np.float32], ids_RK: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the weights [R, K] of the chosen experts."""
    if step.weighting == "one":
        return np.ones(ids_RK.shape, np.float32)
    powers_RE = np.exp(scores_RE - scores_RE.max(axis=1, keepdims=True))
    shares_RE = powers_RE / powers_RE.sum(axis=1, keepdims=True)
    chosen_RK: NDArray[np.float32] = np.take_along_axis(shares_RE, ids_RK, axis=1)
    if step.weighting == "probability":
        return chosen_RK
    total_R1: NDArray[np.float32] = chosen_RK.sum(axis=1, keepdims=True) + np.float32(RENORMALISER)
    return np.asarray(chosen_RK / total_R1)

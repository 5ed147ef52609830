"""Batches of any size: an image's answer does not depend on the others of its batch.

Shapes: N images, C classes.
"""

import numpy as np

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.parity.answers import Answers, Images
from advmoe_deploy.parity.tolerance import (
    LOSSY_ROW,
    relative_distances,
    row_differences,
    same_experts,
)
from advmoe_deploy.runtime.runner import Prediction, Runner, joined

SIZES = (1, 3, 7)
# A few batches of every size.
BATCHED_IMAGES = 21


def batch_complaint(runner: Runner, images: Images, tolerance: float | None) -> str:
    """Return in what ``runner`` answers otherwise in small batches; nothing if in nothing.

    Args:
        runner: the engine.
        images: float32 [N, C, H, W] in [0, 1], of which no route is a close call, see
            :func:`steady_images`. The answer to all at once counts.
        tolerance: of logits in fp32, see :func:`~advmoe_deploy.parity.tolerance.tolerance_for`:
            then no route may differ, either. ``None`` means a lower precision, where each image's
            logits may move by 10 % of their norm.
    """
    if not len(images):
        return ""
    whole = runner.infer(images)
    for size in SIZES:
        parts = np.split(images, range(size, len(images), size))
        answer = joined([runner.infer(part) for part in parts])
        rerouted = 0 if tolerance is None else _rerouted(answer, whole)
        if rerouted:
            return f"in batches of {size}, {rerouted} rows go to other experts than in one batch"
        moved, limit = _moved(answer, whole, tolerance)
        if not moved <= limit:
            return (
                f"in batches of {size}, logits differ from those in one batch by {moved:.3g} of "
                f"their size (limit {limit:.3g})"
            )
    return ""


def require_any_batch(complaint: str, what: str) -> None:
    """Raise :class:`CheckFailedError` if there is a ``complaint`` of ``what``."""
    if complaint:
        raise CheckFailedError(f"{what}: {complaint}; no bundle was written")


def steady_images(
    images: Images, answers: Answers, count: int = BATCHED_IMAGES, margin: float = 0.0
) -> Images:
    """Return the first ``count`` of the half of ``images`` whose routes are the clearest.

    Those of which two scores are within ``margin`` are left out.
    """
    margins_N = np.full(len(images), np.inf)
    for route in answers.routes.values():
        margins_N = np.minimum(margins_N, route.margins.reshape(len(images), -1).min(axis=1))
    clearest = np.argsort(-margins_N, kind="stable")[: (len(images) + 1) // 2]
    return images[np.sort(clearest[margins_N[clearest] > margin])[:count]]


def _moved(answer: Prediction, whole: Prediction, tolerance: float | None) -> tuple[float, float]:
    """Return how far the logits [N, C] of an image moved at most, and the limit."""
    if tolerance is not None:
        return float(row_differences(answer.logits, whole.logits)[1].max()), tolerance
    return float(relative_distances(answer.logits, whole.logits).max()), LOSSY_ROW


def _rerouted(answer: Prediction, whole: Prediction) -> int:
    """Return how many rows, over all layers, go to other experts."""
    ids = answer.expert_ids
    flat = {n: (v.reshape(-1, v.shape[-1]), ids[n]) for n, v in whole.expert_ids.items()}
    return sum(int((~same_experts(v_RK, other)).sum()) for v_RK, other in flat.values())

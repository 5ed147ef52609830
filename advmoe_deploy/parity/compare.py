"""Comparison of an exported model with the torch model: logits, routes, weights.

Shapes: N images, T tokens, R rows of a layer (N, or N * T), C classes, E experts, K experts per
row.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.parity.answers import Answers, Flags, Images, RouteAnswers
from advmoe_deploy.parity.tolerance import row_differences, same_experts, tolerance_for
from advmoe_deploy.reports import LayerParity, ParityReport
from advmoe_deploy.runtime.routing import share_margins
from advmoe_deploy.runtime.runner import Prediction, Runner, joined

# Best scores nearer than this are a close call, unless rounding takes scores further.
CLOSE_CALL = 1e-4

BATCH = 128  # images at a time


def is_right(logits_NK: NDArray[np.float32], labels_N: NDArray[np.int64]) -> Flags:
    """Return which rows [N] answer their label; logits that are not finite answer none."""
    return np.asarray((logits_NK.argmax(axis=1) == labels_N) & np.isfinite(logits_NK).all(axis=1))


def batches_in(images: Images) -> int:
    """Return in how many batches images are answered."""
    return -(-len(images) // BATCH)


def predictions_of(
    runner: Runner, images: Images, passed: Callable[[], None] | None = None
) -> Prediction:
    """Return what ``runner`` answers to ``images``, taken in batches; ``passed`` hears of each."""
    answers = []
    for batch in np.split(images, range(BATCH, len(images), BATCH)):
        answers.append(runner.infer(batch))
        if passed:
            passed()
    return joined(answers)


def compare_answers(
    reference: Answers,
    answer: Prediction,
    *,
    rounding: float = 0.0,
    margin: float = CLOSE_CALL,
    data: str | None = None,
) -> ParityReport:
    """Return the report over ``answer``, which covers the reference's images.

    ``rounding`` is the reference's own, see :func:`~advmoe_deploy.parity.tolerance.tolerance_for`;
    routes whose scores are within ``margin`` are close calls.
    """
    images = len(answer.logits)
    same_N = np.ones(images, dtype=bool)
    finite_N = _finite_rows(answer.logits) & _finite_rows(reference.logits)
    layers, weight_differences = [], [0.0]
    for name, expected in reference.routes.items():
        layer, same_R = _compare_layer(name, expected, answer.expert_ids[name], same_N, margin)
        weights_RK = answer.weights[name].reshape(expected.weights.shape)
        weight_differences.append(_weight_difference(expected, weights_RK, same_R))
        same_N = same_N & _every_row(same_R, images)
        finite_N = finite_N & _every_row(_finite_rows(expected.scores), images)
        layers.append(layer)
    counted_N = same_N & finite_N
    absolute_N, relative_N = row_differences(answer.logits[counted_N], reference.logits[counted_N])
    return ParityReport(
        images=images,
        data=data,
        compared=int(counted_N.sum()),
        non_finite=int((~finite_N).sum()),
        max_abs_logit_diff=float(absolute_N.max(initial=0.0)),
        max_relative_logit_diff=float(relative_N.max(initial=0.0)),
        max_abs_weight_diff=float(np.max(weight_differences)),
        rounding=rounding,
        logit_tolerance=tolerance_for(rounding),
        route_agreement=_agreement(layers),
        margin=margin,
        layers=tuple(layers),
        class_margin_deciles=deciles_of(reference.logits),
    )


def _compare_layer(
    name: str, expected: RouteAnswers, ids: NDArray[np.int64], clean_N: Flags, margin: float
) -> tuple[LayerParity, Flags]:
    """Return the report over the rows of ``clean_N``, and which rows [R] go the same way."""
    same_R = same_experts(expected.expert_ids, ids)
    clean_R = np.repeat(clean_N, len(same_R) // max(1, len(clean_N)))
    margins_R = expected.margins
    clear_R = margins_R > margin
    layer = LayerParity(
        layer=name,
        rows=int(clean_R.sum()),
        flips=int((clean_R & clear_R & ~same_R).sum()),
        close_calls=int((clean_R & ~clear_R).sum()),
        close_flips=int((clean_R & ~clear_R & ~same_R).sum()),
        smallest_margin=_smallest(margins_R),
        expert_load=expected.expert_load,
        margin_deciles=deciles_of(expected.scores),
    )
    return layer, same_R


def deciles_of(scores_RE: NDArray[np.float32]) -> tuple[float, ...]:
    """Return the nine deciles of the rows' margins: largest softmax less the second.

    None where there is but one score a row, or no row of finite margin.
    """
    margins_R = share_margins(scores_RE)
    finite_R = margins_R[np.isfinite(margins_R)]
    if not len(finite_R):
        return ()
    return tuple(np.quantile(finite_R, np.arange(1, 10) / 10).astype(float).tolist())


def _weight_difference(
    expected: RouteAnswers, weights_RK: NDArray[np.float32], same_R: Flags
) -> float:
    """Return the largest difference of the rows that go the same way, best weight first."""
    ours, theirs = np.sort(weights_RK[same_R], axis=1), np.sort(expected.weights[same_R], axis=1)
    return float(np.abs(ours - theirs).max(initial=0.0))


def _every_row(rows_R: Flags, images: int) -> Flags:
    """Return for which images [N] all rows hold."""
    return np.asarray(rows_R.reshape(images, -1).all(axis=1) if images else rows_R)


def _smallest(margins_R: NDArray[np.float32]) -> float | None:
    finite = margins_R[np.isfinite(margins_R)]
    return float(finite.min()) if len(finite) else None


def _agreement(layers: list[LayerParity]) -> float:
    if not layers:
        return 1.0
    clear = sum(layer.rows - layer.close_calls for layer in layers)
    return 1 - sum(layer.flips for layer in layers) / clear if clear else 0.0


def require_parity(report: ParityReport, what: str) -> None:
    """Raise :class:`CheckFailedError` if ``report`` did not pass."""
    if report.passed:
        return
    raise CheckFailedError(f"{what} {_complaint(report)}; no bundle was written")


def _complaint(report: ParityReport) -> str:
    if report.non_finite:
        return f"or the torch model is not finite on {report.non_finite} of {report.images} images"
    if report.undecided:
        rows = {layer.layer: layer.rows for layer in report.layers}
        name = report.undecided[0]
        return (
            f"cannot be compared: on all of {rows[name]} rows the best scores of layer {name} are "
            f"within {report.margin:g}; check on other images with --data, or train the router"
        )
    if not report.mostly_compared and not report.route_flips:
        return (
            f"cannot be compared: only {report.compared} of {report.images} images have the same "
            "routes; check on other images with --data, or train the router"
        )
    return (
        f"differs from the torch model on {report.images} images: logits by "
        f"{report.max_relative_logit_diff:.3g} (limit {report.logit_tolerance:.3g}, relative to "
        f"logits above 1), routing weights by {report.max_abs_weight_diff:.3g}, "
        f"{report.route_flips} clear routes flipped"
    )


def _finite_rows(values_NX: NDArray[np.float32]) -> Flags:
    return np.asarray(np.isfinite(values_NX).all(axis=1))

"""Does the exported model answer what the torch model answers? Logits, routes, every expert.

Shapes: N images, C classes, E experts.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.reference import (
    Answers,
    Images,
    forced_answers,
    reference_answers,
)
from advmoe_deploy.models.advmoe import AdvMoE
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.plan import ExpertsStep, Plan, RunStep
from advmoe_deploy.reports import ParityReport
from advmoe_deploy.runtime.ort_engine import OrtEngine
from advmoe_deploy.runtime.prediction import Prediction
from advmoe_deploy.runtime.runner import Runner

LOGIT_TOLERANCE = 1e-5
ROUTE_MARGIN = 1e-4

_BATCH = 128


def compare_with_reference(
    model: Classifier, runner: Runner, images: Images, *, data: str | None = None
) -> ParityReport:
    """Return how ``runner`` and ``model`` compare on float32 images [N, C, H, W] in [0, 1].

    ``data`` says where the images come from.
    """
    batches = np.split(images, range(_BATCH, len(images), _BATCH))
    predictions = [runner.infer(batch) for batch in batches]
    return compare_answers(reference_answers(model, images), predictions, data=data)


def compare_answers(
    reference: Answers, predictions: list[Prediction], *, data: str | None = None
) -> ParityReport:
    """Return the report over ``predictions``, which together cover the reference's images."""
    logits_NC = np.concatenate([p.logits for p in predictions])
    images = len(logits_NC)
    finite_N = _finite_rows(logits_NC) & _finite_rows(reference.logits)
    same_N = clear_N = np.ones(images, dtype=bool)
    smallest: float | None = None
    load: tuple[int, ...] = (images,)
    if reference.expert_ids is not None and reference.margins is not None:
        ids_N1 = np.concatenate([next(iter(p.expert_ids.values())) for p in predictions])
        same_N = (ids_N1 == reference.expert_ids).all(axis=1)
        clear_N = reference.margins > ROUTE_MARGIN
        smallest = float(reference.margins.min()) if images else None
        load = load_of(reference)
        if reference.scores is not None:
            finite_N = finite_N & _finite_rows(reference.scores)
    counted_N = same_N & finite_N
    absolute_N, relative_N = row_differences(logits_NC[counted_N], reference.logits[counted_N])
    flips = int((clear_N & ~same_N).sum())
    clear = int(clear_N.sum())
    return ParityReport(
        images=images,
        data=data,
        non_finite=int((~finite_N).sum()),
        max_abs_logit_diff=float(absolute_N.max(initial=0.0)),
        max_relative_logit_diff=float(relative_N.max(initial=0.0)),
        logit_tolerance=LOGIT_TOLERANCE,
        route_agreement=1 - flips / clear if clear else 0.0,
        route_flips=flips,
        margin=ROUTE_MARGIN,
        close_calls=images - clear,
        close_flips=int((~clear_N & ~same_N).sum()),
        smallest_margin=smallest,
        images_per_expert=load,
    )


def load_of(reference: Answers) -> tuple[int, ...]:
    """Return how many images each expert gets; all of them where nothing routes."""
    if reference.expert_ids is None or reference.scores is None:
        return (len(reference.logits),)
    experts = reference.scores.shape[1]
    return tuple(np.bincount(reference.expert_ids[:, 0], minlength=experts).tolist())


def row_differences(
    answer: NDArray[np.float32], expected: NDArray[np.float32]
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


def require_parity(report: ParityReport, what: str) -> None:
    """Raise :class:`CheckFailedError` if ``report`` did not pass."""
    if report.passed:
        return
    raise CheckFailedError(f"{what} {_complaint(report)}; no bundle was written")


def _complaint(report: ParityReport) -> str:
    if report.non_finite:
        return f"or the torch model is not finite on {report.non_finite} of {report.images} images"
    if report.close_calls == report.images:
        return (
            f"cannot be compared: on all of {report.images} images the two best scores are within "
            f"{report.margin:g}; check on other images with --data, or train the router"
        )
    return (
        f"differs from the torch model on {report.images} images: logits by "
        f"{report.max_relative_logit_diff:.3g} (limit {report.logit_tolerance:.3g}, relative to "
        f"logits above 1), {report.route_flips} clear routes flipped"
    )


def require_segments(model: AdvMoE, plan: Plan, files: Mapping[str, Path], images: Images) -> None:
    """Check the router's scores, and each pathway with every image forced through it.

    Raises:
        CheckFailedError: a segment's output differs from the torch model's.
    """
    scores = reference_answers(model, images).scores
    assert scores is not None
    for step in plan.steps:
        match step:
            case RunStep():
                _require_segment(plan, step.segment, files, images, scores)
            case ExpertsStep():
                for expert, name in enumerate(step.segments):
                    expected = forced_answers(model, images, expert)
                    _require_segment(plan, name, files, images, expected)


def _require_segment(
    plan: Plan, name: str, files: Mapping[str, Path], images: Images, expected: NDArray[np.float32]
) -> None:
    (image,), (output,) = plan.segment(name).inputs, plan.segment(name).outputs
    with OrtEngine(files[name]) as engine:
        answer = engine.run({image.name: images})[output.name]
    require_near(answer, expected, name)


def require_near(answer: NDArray[np.float32], expected: NDArray[np.float32], what: str) -> None:
    """Raise :class:`CheckFailedError` if a row of ``answer`` is further off than the tolerance."""
    difference = float(row_differences(answer, expected)[1].max())
    if not difference <= LOGIT_TOLERANCE:
        raise CheckFailedError(
            f"{what} differs from the torch model by {difference:.3g} (limit {LOGIT_TOLERANCE:g}, "
            "relative to values above 1); no bundle was written"
        )


def _finite_rows(values_NX: NDArray[np.float32]) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(values_NX).all(axis=1))

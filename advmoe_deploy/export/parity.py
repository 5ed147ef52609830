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
from advmoe_deploy.models.classifier import AdvMoE, Classifier
from advmoe_deploy.plan import ExpertsStep, Plan
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
    same_N = clear_N = np.ones(images, dtype=bool)
    smallest: float | None = None
    load: tuple[int, ...] = (images,)
    if reference.expert_ids is not None and reference.margins is not None:
        ids_N1 = np.concatenate([next(iter(p.expert_ids.values())) for p in predictions])
        same_N = (ids_N1 == reference.expert_ids).all(axis=1)
        clear_N = reference.margins > ROUTE_MARGIN
        smallest = float(reference.margins.min())
        load = load_of(reference)
    flips = int((clear_N & ~same_N).sum())
    clear = int(clear_N.sum())
    return ParityReport(
        images=images,
        data=data,
        max_abs_logit_diff=_difference(logits_NC[same_N], reference.logits[same_N]),
        logit_tolerance=logit_tolerance(reference.logits),
        route_agreement=1 - flips / clear if clear else 1.0,
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


def logit_tolerance(logits: NDArray[np.float32]) -> float:
    """Return 1e-5, or that share of the largest logit where it exceeds 1.

    A float32 keeps seven digits: of a logit of 20 the last bit alone is 2e-6.
    """
    return LOGIT_TOLERANCE * max(1.0, float(np.abs(logits).max()))


def require_parity(report: ParityReport, what: str) -> None:
    """Raise :class:`CheckFailedError` if ``report`` did not pass."""
    if report.passed:
        return
    raise CheckFailedError(
        f"{what} differs from the torch model on {report.images} images: logits by "
        f"{report.max_abs_logit_diff:.3g} (limit {report.logit_tolerance:.3g}), "
        f"{report.route_flips} clear routes flipped; no bundle was written"
    )


def require_pathways(model: AdvMoE, plan: Plan, files: Mapping[str, Path], images: Images) -> None:
    """Check each pathway's segment with every image forced through it, visited or not.

    Raises:
        CheckFailedError: a pathway's logits differ from the torch model's.
    """
    for step in (s for s in plan.steps if isinstance(s, ExpertsStep)):
        for expert, name in enumerate(step.segments):
            expected = forced_answers(model, images, expert)
            with OrtEngine(files[name]) as engine:
                answer = engine.run({plan.segment(name).inputs[0].name: images})
            difference = _difference(answer[plan.segment(name).outputs[0].name], expected)
            if not difference <= (limit := logit_tolerance(expected)):
                raise CheckFailedError(
                    f"{name} differs from expert {expert} of the torch model by "
                    f"{difference:.3g} (limit {limit:.3g}); no bundle was written"
                )


def _difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.abs(a - b).max()) if len(a) else 0.0

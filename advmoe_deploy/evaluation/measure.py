"""Figures of answers to clean images.

Shapes: N images, C classes, B bins, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.evaluation.report import ClassFigures, ConfidenceBin, ExpertUse, Reliability
from advmoe_deploy.parity.answers import Images, Labels
from advmoe_deploy.parity.compare import is_right
from advmoe_deploy.parity.intervals import wilson_interval
from advmoe_deploy.plan import effective_routes
from advmoe_deploy.progress import Progress, task
from advmoe_deploy.runtime.runner import Prediction, joined

BINS = 15
_BATCH = 128

Floats = NDArray[np.float64]
Infer = Callable[[Images], Prediction]


@dataclass(frozen=True)
class Answered:
    """The answers to N labelled images."""

    prediction: Prediction
    labels_N: Labels

    @property
    def right_N(self) -> NDArray[np.bool_]:
        """Images [N] answered by their label; logits that are not finite answer nothing."""
        return is_right(self.prediction.logits, self.labels_N)


def ask(infer: Infer, images: Images, labels_N: Labels, progress: Progress) -> Answered:
    """Return what ``infer`` answers to float32 images [N, C, H, W] in [0, 1], taken in batches."""
    parts, right = [], 0
    with task(progress, "eval", len(images)):
        for start in range(0, len(images), _BATCH):
            rows = slice(start, start + _BATCH)
            parts.append(infer(images[rows]))
            right += int(is_right(parts[-1].logits, labels_N[rows]).sum())
            done = min(start + _BATCH, len(images))
            progress.advance("eval", done - start, accuracy=right / done)
    return Answered(joined(parts), labels_N)


def confusion_of(predicted_N: Labels, labels_N: Labels, classes: int) -> NDArray[np.int64]:
    """Return how many images of each class (rows) were taken for each class (columns) [C, C]."""
    pairs = np.bincount(labels_N * classes + predicted_N, minlength=classes * classes)
    return pairs.reshape(classes, classes)


def class_figures(
    confusion_CC: NDArray[np.int64], images_C: NDArray[np.int64], names: Sequence[str]
) -> tuple[ClassFigures, ...]:
    """Return the figures of each class; ``images_C`` counts those without an answer as well."""
    figures = []
    for label, name in enumerate(names):
        images, predicted = int(images_C[label]), int(confusion_CC[:, label].sum())
        correct = int(confusion_CC[label, label])
        figures.append(
            ClassFigures(
                name=name,
                images=images,
                predicted=predicted,
                correct=correct,
                recall=correct / images if images else None,
                recall_interval=wilson_interval(correct, images),
                precision=correct / predicted if predicted else None,
            )
        )
    return tuple(figures)


def reliability_of(logits_NC: NDArray[np.float32], labels_N: Labels) -> Reliability:
    """Return the calibration of finite logits of at least one image, in :data:`BINS` bins."""
    logs_NC = logits_NC - logits_NC.max(axis=1, keepdims=True).astype(np.float64)
    logs_NC -= np.log(np.exp(logs_NC).sum(axis=1, keepdims=True))
    confidence_N = np.exp(logs_NC.max(axis=1))
    right_N = logits_NC.argmax(axis=1) == labels_N
    bin_N = np.clip(np.ceil(confidence_N * BINS).astype(np.int64) - 1, 0, BINS - 1)
    bins = [_bin(b, confidence_N[bin_N == b], right_N[bin_N == b]) for b in range(BINS)]
    gaps = [each.images * abs(_gap(each)) for each in bins]
    return Reliability(
        ece=sum(gaps) / len(labels_N),
        mean_confidence=float(confidence_N.mean()),
        negative_log_likelihood=float(-logs_NC[np.arange(len(labels_N)), labels_N].mean()),
        bins=tuple(bins),
    )


def _bin(number: int, confidence: Floats, right: NDArray[np.bool_]) -> ConfidenceBin:
    found = len(right) > 0
    return ConfidenceBin(
        low=number / BINS,
        high=(number + 1) / BINS,
        images=len(right),
        confidence=float(confidence.mean()) if found else None,
        accuracy=float(right.mean()) if found else None,
    )


def _gap(each: ConfidenceBin) -> float:
    return (each.accuracy or 0.0) - (each.confidence or 0.0)


def expert_use(
    expert_ids: Mapping[str, NDArray[np.int64]], num_experts: Mapping[str, int]
) -> tuple[ExpertUse, ...]:
    """Return by layer where ``expert_ids`` [N, K], or [N, T, K] of tokens, send the rows."""
    uses = []
    for layer, ids in expert_ids.items():
        load = tuple(np.bincount(ids.reshape(-1), minlength=num_experts[layer]).tolist())
        uses.append(
            ExpertUse(
                layer=layer,
                expert_load=load,
                shares=tuple(rows / sum(load) for rows in load),
                effective_routes=effective_routes(load),
            )
        )
    return tuple(uses)

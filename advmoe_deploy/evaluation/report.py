"""Report of an evaluation on clean images."""

from typing import Literal

from advmoe_deploy.specs import Frozen, Precision


class ClassFigures(Frozen):
    """One class: ``images`` of it, ``predicted`` to be it, ``correct`` the two at once.

    ``recall`` is correct / images, with its 95 % interval, ``precision`` correct / predicted;
    ``None`` where there is nothing to divide by.
    """

    name: str
    images: int
    predicted: int
    correct: int
    recall: float | None
    recall_interval: tuple[float, float]
    precision: float | None


class ConfidenceBin(Frozen):
    """Images whose confidence is above ``low`` and at most ``high``; means are over these."""

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


class Reliability(Frozen):
    """Agreement of confidence, the predicted class's probability, with the chance of being right.

    ``ece`` is the expected calibration error: the mean distance of accuracy from confidence over
    the ``bins``, each weighted by its images. ``negative_log_likelihood``, in nats, is that of the
    right class.

    Source: C. Guo, G. Pleiss, Y. Sun and K. Q. Weinberger, "On calibration of modern neural
    networks" (2017).
    """

    ece: float
    mean_confidence: float
    negative_log_likelihood: float
    bins: tuple[ConfidenceBin, ...]


class ExpertUse(Frozen):
    """Load of one layer's experts: images or tokens, each once for every expert it goes to.

    ``effective_routes`` is exp of the entropy of ``shares``: as many as there are experts where all
    are used alike.
    """

    layer: str
    expert_load: tuple[int, ...]
    shares: tuple[float, ...]
    effective_routes: float


class Confusion(Frozen):
    """Number of images of one class that were taken for another."""

    label: str
    taken_for: str
    images: int


class EvalReport(Frozen):
    """Results on the clean test images of ``data``; nothing was attacked.

    ``kind`` says whether it is a run, computed by ``torch``, or a bundle, by its ``engine``.
    ``accuracy`` has a 95 % Wilson interval. Row L of ``confusion`` counts the images of class L by
    the class they were taken for. ``unanswered`` images have logits that are not finite: they count
    as wrong, and in neither ``confusion`` nor ``reliability``, which is ``None`` if there is no
    other. ``warnings`` name layers in which but one expert is in use.
    """

    model: str
    kind: Literal["run", "bundle"]
    engine: str
    precision: Precision
    tf32: bool
    data: str
    images: int
    correct: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    unanswered: int
    classes: tuple[ClassFigures, ...]
    confusion: tuple[tuple[int, ...], ...]
    reliability: Reliability | None
    experts: tuple[ExpertUse, ...]
    versions: dict[str, str]
    seconds: float
    warnings: tuple[str, ...] = ()

    def most_confused(self, count: int) -> list[Confusion]:
        """Return the ``count`` pairs of classes that are mistaken most often, that first."""
        names = [each.name for each in self.classes]
        pairs = [
            Confusion(label=names[label], taken_for=names[other], images=images)
            for label, row in enumerate(self.confusion)
            for other, images in enumerate(row)
            if images and label != other
        ]
        return sorted(pairs, key=lambda pair: -pair.images)[:count]

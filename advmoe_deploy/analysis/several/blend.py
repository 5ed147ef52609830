"""Blends of a dual model over alpha, without training: the front of accuracy and robustness.

F_D = (1 - alpha) * F_S + alpha * F_R of a standard and a robust mixture (Zhang et al., arXiv
2502.06832, which sweeps alpha from 0.5 to 1). Only the blend of the logits depends on alpha; what
JTDMoE trained was trained for one alpha all the same.
"""

import copy
import platform
import time
from collections.abc import Sequence

import torch

from advmoe_deploy import __version__
from advmoe_deploy.analysis.redundancy import TARGETS, Withstood
from advmoe_deploy.analysis.several.roles import on_the_same_data
from advmoe_deploy.analysis.several.trial import Trial, TrialSettings
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.base import require_routes
from advmoe_deploy.models.families.dual import DualModel
from advmoe_deploy.models.stored import StoredModel
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.specs import Frozen, ThreatModel

_TASK = "alpha"


class BlendPoint(Frozen):
    """One alpha. ``on_front``: no other is as good in both accuracies and better in one."""

    alpha: float
    withstood: Withstood
    on_front: bool


class Beside(Frozen):
    """Another run, such as RT-ER's one mixture, under the same attacks."""

    run: str
    recipe: str
    withstood: Withstood


class BlendReport(Frozen):
    """Every alpha, in the order given; ``trained_alpha`` is what the model was trained with."""

    model: str
    recipe: str
    data: str
    images: int
    threat: ThreatModel
    steps: int
    seed: int
    trained_alpha: float
    points: tuple[BlendPoint, ...]
    beside: tuple[Beside, ...]
    versions: dict[str, str]
    seconds: float


def blended(model: DualModel, alpha: float) -> DualModel:
    """Return ``model`` with another ``alpha``; the two share their weights."""
    other = copy.copy(model)
    other.alpha = alpha
    other.spec = model.spec.model_copy(update={"alpha": alpha})
    return other


def blend(
    stored: StoredModel,
    alphas: Sequence[float],
    settings: TrialSettings,
    *,
    beside: Sequence[StoredModel] = (),
    progress: Progress | None = None,
) -> BlendReport:
    """Return what ``stored``, of family dual-model, withstands at each of ``alphas``.

    The models ``beside`` it are attacked on the same images, at the same radius.

    Raises:
        UsageError: a model beside it takes or was trained on other images, knows other classes or
            routes nothing; data that do not fit.
    """
    started = time.perf_counter()
    progress, model = progress or Silent(), stored.model
    assert isinstance(model, DualModel), "whoever names the run has seen its family"
    for other in beside:
        _require_alike(stored, other)
    trial = Trial.of(stored, settings)
    found: list[Withstood] = []
    others = []
    with task(progress, _TASK, (len(alphas) + len(beside)) * len(TARGETS)):
        for alpha in alphas:
            found.append(trial.put_to(blended(model, alpha), progress, _TASK))
        for other in beside:
            result = trial.put_to(other.model, progress, _TASK)
            others.append(Beside(run=str(other.path), recipe=other.recipe, withstood=result))
    return BlendReport(
        model=str(stored.path),
        recipe=stored.recipe,
        data=trial.source,
        images=len(trial.labels),
        threat=trial.threat,
        steps=settings.steps,
        seed=settings.seed,
        trained_alpha=model.alpha,
        points=tuple(
            BlendPoint(alpha=alpha, withstood=one, on_front=_on_front(one, found))
            for alpha, one in zip(alphas, found, strict=True)
        ),
        beside=tuple(others),
        versions={
            "advmoe": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        seconds=time.perf_counter() - started,
    )


def _on_front(one: Withstood, found: Sequence[Withstood]) -> bool:
    own = one.accuracy.value, one.together.value
    pairs = [(other.accuracy.value, other.together.value) for other in found]
    return not any(a >= own[0] and b >= own[1] and (a, b) != own for a, b in pairs)


def _require_alike(stored: StoredModel, other: StoredModel) -> None:
    require_routes(other.model)
    ours, theirs = stored.model.spec.image_shape, other.model.spec.image_shape
    if ours != theirs or stored.class_names != other.class_names:
        raise UsageError(
            f"{other.path} takes images {theirs} of {len(other.class_names)} classes, {stored.path}"
            f" {ours} of {len(stored.class_names)}; name runs on the same data"
        )
    if not on_the_same_data(stored, other):
        raise UsageError(
            f"{other.path} was trained on other images ({other.data}) than {stored.path} "
            f"({stored.data}); name runs on the same data"
        )

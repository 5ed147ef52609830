"""Blends of a dual model over alpha, without training: the front of accuracy and robustness.

F_D = (1 - alpha) * F_S + alpha * F_R of a standard and a robust mixture (Zhang et al., arXiv
2502.06832, which sweeps alpha from 0.5 to 1). Only the blend of the logits depends on alpha; what
JTDMoE trained was trained for one alpha all the same.
"""

import copy
import time
from collections.abc import Sequence

from advmoe_deploy.analysis.redundancy import TARGETS, Withstood
from advmoe_deploy.analysis.several.roles import on_the_same_data
from advmoe_deploy.analysis.several.trial import SharedTrial, TrialSettings
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.base import require_routes
from advmoe_deploy.models.families.dual import DualModel
from advmoe_deploy.models.stored import StoredModel
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.reports.versions import installed_versions
from advmoe_deploy.specs import Frozen, ThreatModel

_TASK = "alpha"


class BlendPoint(Frozen):
    """Accuracies of the blend at one alpha."""

    alpha: float
    withstood: Withstood


class ComparedRun(Frozen):
    """Another run, such as RT-ER's one mixture, under the same attacks."""

    run: str
    recipe: str
    withstood: Withstood


class BlendReport(Frozen):
    """Every alpha, in the order given; ``trained_alpha`` is what the model was trained with.

    ``front`` are the alphas to which no other is as good in both accuracies and better in one.
    """

    model: str
    recipe: str
    data: str
    images: int
    threat: ThreatModel
    steps: int
    seed: int
    trained_alpha: float
    points: tuple[BlendPoint, ...]
    front: tuple[float, ...]
    beside: tuple[ComparedRun, ...]
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
    measured: list[BlendPoint | ComparedRun] | None = None,
    progress: Progress | None = None,
) -> BlendReport:
    """Return what ``stored``, of family dual-model, withstands at each of ``alphas``.

    The models ``beside`` it are attacked on the same images, at the same radius. A list
    ``measured`` is filled with what was found of each alpha and each of them as it ends.

    Raises:
        UsageError: a model beside it takes or was trained on other images, knows other classes or
            routes nothing; data that do not fit.
    """
    started = time.perf_counter()
    progress, model = progress or Silent(), stored.model
    assert isinstance(model, DualModel), "whoever names the run has seen its family"
    for other in beside:
        _require_alike(stored, other)
    trial = SharedTrial.of(stored, settings)
    measured = [] if measured is None else measured
    with task(progress, _TASK, (len(alphas) + len(beside)) * len(TARGETS)):
        for alpha in alphas:
            found = trial.put_to(blended(model, alpha), progress, _TASK)
            measured.append(BlendPoint(alpha=alpha, withstood=found))
        for other in beside:
            found = trial.put_to(other.model, progress, _TASK)
            measured.append(ComparedRun(run=str(other.path), recipe=other.recipe, withstood=found))
    points = tuple(one for one in measured if isinstance(one, BlendPoint))
    return BlendReport(
        model=str(stored.path),
        recipe=stored.recipe,
        data=trial.source,
        images=len(trial.labels),
        threat=trial.threat,
        steps=settings.steps,
        seed=settings.seed,
        trained_alpha=model.alpha,
        points=points,
        front=front_of(points),
        beside=tuple(one for one in measured if isinstance(one, ComparedRun)),
        versions=installed_versions(),
        seconds=time.perf_counter() - started,
    )


def front_of(points: Sequence[BlendPoint]) -> tuple[float, ...]:
    """Return the alphas to which no other is as good in both accuracies and better in one."""
    pairs = [(p.withstood.accuracy.value, p.withstood.together.value) for p in points]
    return tuple(
        point.alpha
        for point, (clean, robust) in zip(points, pairs, strict=True)
        if not any(a >= clean and b >= robust and (a, b) != (clean, robust) for a, b in pairs)
    )


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

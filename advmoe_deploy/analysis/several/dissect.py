"""Dissection: what a robust router and robust experts are each worth, and whether that lasts.

Shapes: N images.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from advmoe_deploy.analysis.redundancy import TARGETS, Withstood
from advmoe_deploy.analysis.routing_change import changed_images
from advmoe_deploy.analysis.several.roles import BEGINS_WITH, ROLES, Role, Run
from advmoe_deploy.analysis.several.trial import SharedTrial, TrialSettings
from advmoe_deploy.analysis.shares import Marked, answers, marked
from advmoe_deploy.attacks.effort import attack_task
from advmoe_deploy.attacks.white_box import attack_model
from advmoe_deploy.errors import UsageError
from advmoe_deploy.families import Family
from advmoe_deploy.models.base import Classifier, is_router_parameter
from advmoe_deploy.models.stored import StoredModel, open_stored
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.reports.versions import installed_versions
from advmoe_deploy.specs import AttackTarget, Frozen, ThreatModel

_TASK = "dissection"
_FLIPPED_BY: tuple[AttackTarget, ...] = ("straight-through", "router")


class Dissected(Frozen):
    """One run: what it withstands, and how many images PGD sends to other experts.

    ``flips`` are those of PGD on the loss of the model, straight through the router,
    ``router_flips`` those of PGD on the routes alone. Both go on where an answer is wrong already.
    """

    role: Role
    run: str
    recipe: str
    method: str
    loss: str
    withstood: Withstood
    flips: Marked
    router_flips: Marked


class DissectionReport(Frozen):
    """All runs, in the order of the roles."""

    family: Family
    data: str
    images: int
    threat: ThreatModel
    steps: int
    seed: int
    runs: tuple[Dissected, ...]
    versions: dict[str, str]
    seconds: float

    def of(self, role: Role) -> Dissected:
        """Return the one run of a role that is needed."""
        return next(run for run in self.runs if run.role == role)


def dissect(
    roles: Mapping[Role, Sequence[Run]],
    settings: TrialSettings,
    *,
    measured: list[Dissected] | None = None,
    progress: Progress | None = None,
) -> DissectionReport:
    """Return what the runs of all ``roles`` withstand on the same images, under the same attacks.

    A list ``measured`` is filled with what was found of each run as it ends.

    Raises:
        UsageError: the runs are for several radii and none is given; a run does not hold the
            part still that it was not to train; data that do not fit.
        InputError: a run is damaged.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    runs = [(role, run) for role in ROLES for run in roles.get(role, ())]
    stored = {run.path: open_stored(run.path) for _, run in runs}
    _require_parts_kept(roles, stored)
    if settings.epsilon is None:
        _require_one_radius([run for _, run in runs])
    trial = SharedTrial.of(stored[roles["standard"][0].path], settings)
    found = [] if measured is None else measured
    with task(progress, _TASK, len(runs) * (len(TARGETS) + len(_FLIPPED_BY))):
        for role, run in runs:
            found.append(_dissected(role, run, stored[run.path].model, trial, progress))
    return DissectionReport(
        family=stored[runs[0][1].path].model.spec.family,
        data=trial.source,
        images=len(trial.labels),
        threat=trial.threat,
        steps=settings.steps,
        seed=settings.seed,
        runs=tuple(found),
        versions=installed_versions(),
        seconds=time.perf_counter() - started,
    )


def _dissected(
    role: Role, run: Run, model: Classifier, trial: SharedTrial, progress: Progress
) -> Dissected:
    flips = []
    for target in _FLIPPED_BY:
        flips.append(_moved(target, model, trial, progress))
        progress.advance(_TASK, routes_changed=flips[-1].value)
    recipe = run.checkpoint.recipe
    return Dissected(
        role=role,
        run=run.name,
        recipe=str(recipe.get("name", "")),
        method=str(recipe["method"]),
        loss=str(recipe["loss"]),
        withstood=trial.put_to(model, progress, _TASK),
        flips=flips[0],
        router_flips=flips[1],
    )


def _moved(
    target: AttackTarget, model: Classifier, trial: SharedTrial, progress: Progress
) -> Marked:
    """Return whom PGD with ``target`` sends to other experts."""
    attack, images = trial.attack.model_copy(update={"target": target}), len(trial.labels)
    with attack_task(progress, model, attack, images):
        found = attack_model(model, trial.images, trial.labels, trial.threat, attack)
    (_, clean), (_, attacked) = answers(model, trial.images), answers(model, found)
    return marked(changed_images(clean, attacked, images))


def _require_parts_kept(
    roles: Mapping[Role, Sequence[Run]], stored: Mapping[Path, StoredModel]
) -> None:
    """Refuse a run whose other part is not to the bit that of the run with which it began."""
    for role, before in BEGINS_WITH.items():
        (run,), (origin,) = roles[role], roles[before]
        of_router = role != "robust router"  # which trained nothing else
        theirs = stored[origin.path].model.state_dict()
        for name, tensor in stored[run.path].model.state_dict().items():
            if is_router_parameter(name) == of_router and not torch.equal(tensor, theirs[name]):
                part = "router" if of_router else "experts"
                raise UsageError(
                    f"{run.name} was to keep the {part} of {origin.name}, and {name} is another; "
                    f"train it anew, --from {origin.name}"
                )


def _require_one_radius(runs: Sequence[Run]) -> None:
    radii = {run.checkpoint.threat.epsilon: run for run in runs if run.checkpoint.threat}
    if len(radii) > 1:
        (one, first), (other, second) = list(radii.items())[:2]
        raise UsageError(
            f"{first.name} is for epsilon {one:g}, {second.name} for {other:g}; say by --epsilon "
            "which all are attacked with"
        )

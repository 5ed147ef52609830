"""Analysis of one model: all sections, in the order in which their results help each other."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advmoe_deploy.analysis.budget import passes_by_section, plan_within, seconds_per_pass
from advmoe_deploy.analysis.certificate import Certificate, certificate
from advmoe_deploy.analysis.lipschitz import (
    BoundaryJumps,
    Lipschitz,
    boundary_jumps,
    lipschitz_constants,
)
from advmoe_deploy.analysis.protocol.capacity import (
    CapacityReport,
    over_capacities,
    require_capacities,
)
from advmoe_deploy.analysis.protocol.radii import Protocol, RadiiReport, over_radii
from advmoe_deploy.analysis.redundancy import ExpertReport, expert_report, steps_of_report
from advmoe_deploy.analysis.routes import LayerUse, route_use
from advmoe_deploy.analysis.routing_change import AttackEffect, MovedImage, effect_of
from advmoe_deploy.analysis.sections import DENSE_SECTIONS, SECTIONS, Section
from advmoe_deploy.analysis.shares import Share, share_of
from advmoe_deploy.analysis.smoothing import Smoothing, SmoothingReport, certify
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.data.matching import Trained, matching_test_images
from advmoe_deploy.data.registry import absolute
from advmoe_deploy.families import Family
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.stored import StoredModel
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.reports.versions import installed_versions
from advmoe_deploy.specs import AttackSpec, AttackTarget, Frozen, ThreatModel

# Radii at which routes are watched, in parts of the threat model's; the last is beyond it.
_RADII = (0.25, 0.5, 1.0, 1.5)
_WATCHED: tuple[AttackTarget, ...] = ("model", "router")


class AnalysisReport(Frozen):
    """Results of an analysis. A section that was not run is ``None``; ``notes`` say why."""

    model: str
    recipe: str
    family: Family
    data: str
    images: int
    threat: ThreatModel
    steps: int
    seed: int
    class_names: tuple[str, ...]
    accuracy: Share
    routes: tuple[LayerUse, ...] | None
    changes: tuple[AttackEffect, ...] | None
    experts: ExpertReport | None
    lipschitz: tuple[Lipschitz, ...] | None
    jumps: BoundaryJumps | None
    certificate: Certificate | None
    radii: RadiiReport | None
    capacity: CapacityReport | None
    smoothing: SmoothingReport | None
    notes: tuple[str, ...]
    versions: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class AnalysisSettings:
    """Settings of an analysis: ``steps`` are PGD's; smoothing keeps what it has in ``journal``.

    ``protocol`` is of the sections radii and capacity.

    ``class_map`` is the model's name of classes that ``data`` calls otherwise. ``budget`` are the
    seconds that all of it may take: fewer images are looked at, or sections left out, and the notes
    of the report say so.
    """

    sections: tuple[Section, ...] = SECTIONS
    images: int | None = 200
    data: str | None = None
    class_map: Mapping[str, str] = field(default_factory=dict)
    epsilon: float | None = None
    steps: int = 20
    seed: int = 0
    protocol: Protocol = field(default_factory=Protocol)
    smoothing: Smoothing = field(default_factory=Smoothing)
    journal: Path | None = None
    budget: float | None = None


def analyze(
    stored: StoredModel,
    settings: AnalysisSettings,
    *,
    measured: list[AnalysisReport] | None = None,
    moved: list[MovedImage] | None = None,
    progress: Progress | None = None,
) -> AnalysisReport:
    """Return the report on ``stored``, measured on test images.

    A list ``measured`` gets the report so far where a later section fails or is stopped, ``moved``
    the images that an attack on the routes alone, at the radius of the threat model, sends to other
    experts.

    Raises:
        UsageError: no threat model, no data, data that does not fit, or a protocol that does not.
        CheckFailedError: the model's answers are not finite.
    """
    started = time.perf_counter()
    settings.protocol.require_twin(stored)
    require_capacities(stored, settings.protocol.capacities)
    source = absolute(settings.data or stored.data, stored.model.spec.image_size)
    threat = stored.threat_model(settings.epsilon)
    trained = Trained(stored.model.spec, stored.class_names, stored.decoding, stored.fingerprint)
    pixels, labels = matching_test_images(
        source, trained, settings.images, class_map=settings.class_map
    )
    work = _Work(
        stored.model,
        torch.from_numpy(pixels),
        torch.from_numpy(labels),
        threat,
        settings,
        progress or Silent(),
        moved,
    )
    found = _Found()
    try:
        work.fit_budget(started)
        work.run(found)
    except BaseException:
        if measured is not None and found != _Found():
            measured.append(_report(stored, work, found, source, started))
        raise
    return _report(stored, work, found, source, started)


@dataclass
class _Found:
    """The sections so far."""

    routes: tuple[LayerUse, ...] | None = None
    changes: tuple[AttackEffect, ...] | None = None
    experts: ExpertReport | None = None
    lipschitz: tuple[Lipschitz, ...] | None = None
    jumps: BoundaryJumps | None = None
    certificate: Certificate | None = None
    radii: RadiiReport | None = None
    capacity: CapacityReport | None = None
    smoothing: SmoothingReport | None = None


def _report(
    stored: StoredModel, work: "_Work", found: _Found, source: str, started: float
) -> AnalysisReport:
    settings = work.settings
    return AnalysisReport(
        model=str(stored.path),
        recipe=stored.recipe,
        family=stored.model.spec.family,
        data=source,
        images=len(work.labels),
        threat=work.threat,
        steps=settings.steps,
        seed=settings.seed,
        class_names=stored.class_names,
        accuracy=share_of(predict(stored.model, work.images) == work.labels),
        **vars(found),
        notes=((() if stored.model.rules else (_DENSE_NOTE,)) + work.notes),
        versions=installed_versions(),
        seconds=time.perf_counter() - started,
    )


_DENSE_NOTE = f"a dense model routes nothing: analysed are {', '.join(DENSE_SECTIONS)}"


class _Work:
    """One model, its images, and the sections that were asked for."""

    def __init__(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        settings: AnalysisSettings,
        progress: Progress,
        moved: list[MovedImage] | None,
    ) -> None:
        self.moved = moved
        self.model = model
        self.images, self.labels = self.all = images, labels
        self.threat = threat
        self.settings = settings
        self.progress = progress
        self.attack = AttackSpec(name="pgd", steps=settings.steps, seed=settings.seed)
        self.sections: tuple[str, ...] = settings.sections
        self.notes: tuple[str, ...] = ()

    def fit_budget(self, started: float) -> None:
        """Keep as many images and sections as fit into what is left of the budget, if there is one.

        ``started`` is when it began to run, of ``time.perf_counter``.
        """
        if (budget := self.settings.budget) is None:
            return
        per_pass = seconds_per_pass(self.model, self.images, self.labels, self.threat)
        watched = [target for target in _WATCHED for _ in _RADII]
        passes = passes_by_section(
            self.model,
            self.sections,
            watched,
            self.settings.steps,
            self.settings.smoothing,
            self.settings.protocol,
        )
        left = budget - (time.perf_counter() - started)
        plan = plan_within(left, per_pass, passes, len(self.labels))
        self.notes = plan.notes(len(self.labels), budget)
        for note in self.notes:
            self.progress.note(note)
        self.sections = plan.sections
        self.images, self.labels = self.images[: plan.images], self.labels[: plan.images]

    def run(self, found: _Found) -> None:
        """Fill ``found`` with what was asked for, each section as it ends."""
        sections = set(self.sections)
        constants: tuple[Lipschitz, ...] = ()
        if {"lipschitz", "certificate"} & sections:
            constants = self._constants()
        if "lipschitz" in sections:
            found.lipschitz = constants
            if self.model.rules:
                found.jumps = boundary_jumps(
                    self.model, self.images, seed=self.settings.seed, progress=self.progress
                )
        if "routes" in sections:
            found.routes = route_use(self.model, self.images, self.labels)
        if "changes" in sections:
            found.changes = self._changes()
        if "experts" in sections:
            found.experts = self._experts()
        if "certificate" in sections:
            found.certificate = self._task("certificate", lambda: self._certificate(constants))
        self._protocol(sections, found)
        if "smoothing" in sections:
            found.smoothing = self._smoothing()

    def _task(self, name: str, make: Callable[[], Any]) -> Any:
        with task(self.progress, name, 1):
            value = make()
            self.progress.advance(name)
        return value

    def _changes(self) -> tuple[AttackEffect, ...]:
        effects = []
        with task(self.progress, "changes", len(_RADII) * len(_WATCHED)):
            for target in _WATCHED:
                attack = self.attack.model_copy(update={"target": target})
                for part in _RADII:
                    ball = ThreatModel(epsilon=min(1.0, part * self.threat.epsilon))
                    moved = self.moved if (target, part) == ("router", 1.0) else None
                    effect = effect_of(
                        self.model,
                        self.images,
                        self.labels,
                        ball,
                        attack,
                        moved=moved,
                        progress=self.progress,
                    )
                    effects.append(effect)
                    self.progress.advance("changes", routes_changed=effect.route_change.value)
        return tuple(effects)

    def _experts(self) -> ExpertReport:
        with task(self.progress, "experts", steps_of_report(self.model)):
            return expert_report(
                self.model,
                self.images,
                self.labels,
                self.threat,
                self.attack,
                progress=self.progress,
            )

    def _constants(self) -> tuple[Lipschitz, ...]:
        return lipschitz_constants(
            self.model,
            self.images,
            self.threat,
            seed=self.settings.seed,
            progress=self.progress,
        )

    def _protocol(self, sections: set[str], found: _Found) -> None:
        """Fill in what V-MoE's protocol is for."""
        model, images, labels = self.model, self.images, self.labels
        protocol, progress = self.settings.protocol, self.progress
        if "radii" in sections:
            found.radii = over_radii(model, images, labels, protocol, progress)
        if "capacity" in sections:
            found.capacity = over_capacities(model, images, labels, self.threat, protocol, progress)

    def _certificate(self, constants: tuple[Lipschitz, ...]) -> Certificate:
        return certificate(self.model, self.images, self.labels, self.threat, constants)

    def _smoothing(self) -> SmoothingReport:
        return certify(
            self.model,
            *self.all,  # a budget leaves more or fewer the next time: the journal is of any
            self.settings.smoothing,
            first=len(self.labels),
            journal=self.settings.journal,
            progress=self.progress,
        )

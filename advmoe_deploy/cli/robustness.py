"""Robustness report of a bundle: what ``verify`` measures, how it converged, what is certain.

``verify`` and ``analysis`` do not know each other; here their findings meet.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from advmoe_deploy.analysis.certificate import local_radii
from advmoe_deploy.analysis.vacuous import is_vacuous
from advmoe_deploy.bundle import CARD, REFERENCE, Bundle
from advmoe_deploy.card import replace_card
from advmoe_deploy.errors import AdvMoEError, BundleError, file_error
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.stored import reference_model
from advmoe_deploy.parity.answers import Images
from advmoe_deploy.progress import Progress
from advmoe_deploy.reports.versions import installed_versions
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.specs import ThreatModel
from advmoe_deploy.verify.examples.card import with_measured
from advmoe_deploy.verify.examples.convergence import convergence
from advmoe_deploy.verify.examples.entry import CertifiedRoutes, Entry, Robustness, entry_of
from advmoe_deploy.verify.examples.images import images_of, source_of
from advmoe_deploy.verify.examples.rerouted import rerouted_images
from advmoe_deploy.verify.examples.stored import (
    StoredExamples,
    read_examples,
)
from advmoe_deploy.verify.report import AttackOutcome, RobustReport
from advmoe_deploy.verify.suites import Suite
from advmoe_deploy.verify.verify import verify_bundle

EXAMPLES_FILE = "examples.npz"


@dataclass(frozen=True)
class VerifyOptions:
    """Options of a verification: engines, the first of which gives the figures, and the images."""

    engines: tuple[str, ...]
    attacks: Suite
    data: str | None
    class_map: Mapping[str, str] | None
    images: int | None
    epsilon: float | None
    max_drop: float
    threads: int
    allow_fragile: bool = False


@dataclass(frozen=True)
class Seen:
    """An entry, and the pictures [N, C, H, W] that its page shows."""

    entry: Entry
    clean_NCHW: Images
    examples: StoredExamples


def robustness_of(
    bundle: Bundle,
    options: VerifyOptions,
    folder: Path,
    *,
    measured: list[AttackOutcome],
    progress: Progress,
) -> Seen:
    """Return what there is to say of ``bundle``; adversarial examples are put into ``folder``."""
    started = time.perf_counter()
    names = [
        EXAMPLES_FILE,
        *(f"examples-{each.replace(':', '-')}.npz" for each in options.engines[1:]),
    ]
    for engine in options.engines[1:]:  # said before the first is attacked, not after
        open_runner(bundle, engine, threads=options.threads).close()
    reports = []
    for engine, name in zip(options.engines, names, strict=True):
        reports.append(_verified(bundle, options, engine, folder / name, measured, progress))
    model, threat = reference_model(bundle), reports[0].threat
    clean_NCHW, labels_N = images_of(
        bundle, source_of(bundle, options.data), options.images, options.class_map
    )
    examples = read_examples(folder / EXAMPLES_FILE)
    examples.require_of(clean_NCHW, labels_N, folder / EXAMPLES_FILE)
    robustness = Robustness(
        bundle=bundle.path.resolve().name,
        model=bundle.manifest.files[REFERENCE].sha256,
        suite=options.attacks,
        engines=tuple(reports),
        examples=tuple(names),
        convergence=convergence(model, clean_NCHW, labels_N, threat, progress),
        rerouted=rerouted_images(model, clean_NCHW, examples),
        certified=certified_routes(model, clean_NCHW, threat),
        versions=installed_versions(),
        seconds=time.perf_counter() - started,
    )
    return Seen(entry_of(bundle, robustness), clean_NCHW, examples)


def _verified(
    bundle: Bundle,
    options: VerifyOptions,
    engine: str,
    examples: Path,
    measured: list[AttackOutcome],
    progress: Progress,
) -> RobustReport:
    return verify_bundle(
        bundle,
        engine=engine,
        data=options.data,
        class_map=options.class_map,
        attacks=options.attacks,
        images=options.images,
        epsilon=options.epsilon,
        max_drop=options.max_drop,
        threads=options.threads,
        allow_fragile=options.allow_fragile,
        measured=measured,
        examples=examples,
        progress=progress,
    )


def certified_routes(model: Classifier, x_NCHW: Images, threat: ThreatModel) -> CertifiedRoutes:
    """Return on how many of ``x_NCHW`` [N, C, H, W] the route provably cannot change."""
    known = {"images": len(x_NCHW), "epsilon": threat.epsilon}
    if not model.rules:
        return CertifiedRoutes(**known, note="nothing is routed")
    radii = local_radii(model, torch.from_numpy(x_NCHW))
    if isinstance(radii, str):
        return CertifiedRoutes(**known, note=radii)
    assert radii[0] is not None, "a model that routes has radii of its routes"
    route_N = radii[0].clamp(max=1.0).numpy()
    return CertifiedRoutes(
        **known,
        certified=int((route_N >= threat.epsilon).sum()),
        median_radius=float(np.median(route_N)),
        vacuous=is_vacuous(radii[0]),
        note="formal: margins of the gates' scores over the bound of their slopes, in l-inf",
    )


def put_on_card(bundle: Bundle, measured: Robustness) -> AdvMoEError | None:
    """Put what was ``measured`` on the bundle's card; return why that cannot be, if it cannot."""
    try:
        card = bundle.file(CARD).read_text(encoding="utf-8")
        replace_card(bundle, with_measured(card, measured))
    except (OSError, BundleError) as error:
        cause = file_error(error) if isinstance(error, OSError) else error
        if cause is None:
            raise
        return type(cause)(
            f"the report is written, the bundle and its card are as they were: {cause}; "
            "--no-card leaves them alone"
        )
    return None


def worst(reports: Sequence[RobustReport]) -> RobustReport:
    """Return the report to answer for all: one that failed, else one undecided, else the first."""
    order = ("failed", "undecided", "passed")
    return min(reports, key=lambda report: order.index(report.verdict))

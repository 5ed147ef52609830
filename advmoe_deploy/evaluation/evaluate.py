"""Evaluation of a run by torch, or of a bundle by an engine, on the same clean test images."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.matching import Trained, matching_test_images
from advmoe_deploy.data.registry import absolute
from advmoe_deploy.evaluation.measure import (
    Answered,
    Infer,
    ask,
    class_figures,
    confusion_of,
    expert_use,
    reliability_of,
)
from advmoe_deploy.evaluation.report import EvalReport
from advmoe_deploy.parity.answers import Images, Labels
from advmoe_deploy.parity.intervals import wilson_interval
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.reports.cautions import of_routes
from advmoe_deploy.reports.checkpoint import checkpoint_folder, read_checkpoint
from advmoe_deploy.reports.versions import installed_versions
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.runtime.select import engine_for, open_runner
from advmoe_deploy.specs import Precision


@dataclass(frozen=True)
class _Labelled:
    """Test images [N, C, H, W] of a source, labelled as the model's are."""

    source: str
    x_NCHW: Images
    labels_N: Labels
    class_names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        trained: Trained,
        data: str,
        class_map: Mapping[str, str] | None,
        images: int | None,
    ) -> "_Labelled":
        """Return the test images of ``data`` as a model that was ``trained`` takes them."""
        source = absolute(data, trained.spec.image_size)
        found = matching_test_images(source, trained, images, class_map=class_map)
        return cls(source, *found, trained.class_names)


@dataclass(frozen=True)
class _Subject:
    """Subject of an evaluation: how it computes, and the experts of its routed layers."""

    path: Path
    kind: Literal["run", "bundle"]
    engine: str
    precision: Precision
    tf32: bool
    num_experts: Mapping[str, int]
    infer: Infer


def evaluate_bundle(
    bundle: Bundle,
    *,
    engine: str | None = None,
    data: str | None = None,
    class_map: Mapping[str, str] | None = None,
    images: int | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> EvalReport:
    """Return what ``engine`` answers to clean test images; needs no torch.

    Args:
        bundle: an opened bundle.
        engine: a name from ``runtime.select.ENGINES``, or ``NAME:PRECISION``; by default what the
            bundle was made for.
        data: a data source; by default the one the model was trained on. Its test split is used,
            its classes matched to the model's by name.
        class_map: the model's name of classes that ``data`` calls otherwise.
        images: how many test images, all by default.
        threads: of the engine; 0 is :func:`~advmoe_deploy.process.default_threads`.
        progress: who listens.

    Raises:
        UsageError: the engine is unknown, or the data do not fit the model or are not named.
        DataError: the data cannot be read.
        BackendUnavailableError: the engine's package is not installed.
    """
    started, progress, manifest = time.perf_counter(), progress or Silent(), bundle.manifest
    chosen = engine_for(bundle, engine, progress.note)
    labelled = _Labelled.of(Trained.of(manifest), data or manifest.data, class_map, images)
    with _of_bundle(bundle, chosen, threads) as subject:
        return _evaluated(subject, labelled, started, progress)


def evaluate_run(
    run: Path,
    *,
    data: str | None = None,
    class_map: Mapping[str, str] | None = None,
    images: int | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Return what the torch model of ``run`` answers to clean test images.

    Args:
        run: a run, or one of its checkpoints.
        data: as for :func:`evaluate_bundle`.
        class_map: as for :func:`evaluate_bundle`.
        images: how many test images, all by default.
        progress: who listens.

    Raises:
        InputError: the model is missing or damaged.
        UsageError: the data do not fit the model, or are not named.
        DataError: the data cannot be read.
    """
    started = time.perf_counter()
    kept = read_checkpoint(checkpoint_folder(run))
    trained = Trained(kept.model, kept.class_names, kept.decoding, kept.fingerprint)
    # What is wrong with the data is said before PyTorch is loaded.
    labelled = _Labelled.of(trained, data or kept.data, class_map, images)
    return _evaluated(_of_run(run), labelled, started, progress or Silent())


@contextmanager
def _of_bundle(bundle: Bundle, engine: str, threads: int) -> Iterator[_Subject]:
    manifest = bundle.manifest
    with open_runner(bundle, engine, threads=threads) as runner:
        yield _Subject(
            path=bundle.path,
            kind="bundle",
            engine=runner.name,
            precision=runner.precision,
            tf32=runner.tf32,
            num_experts={route.layer: route.num_experts for route in manifest.plan.routes},
            infer=runner.infer,
        )


def _of_run(run: Path) -> _Subject:
    from advmoe_deploy.models.stored import open_stored  # these two need torch
    from advmoe_deploy.parity.reference import reference_answers

    stored = open_stored(run)
    model = stored.model

    def infer(images: Images) -> Prediction:
        answers = reference_answers(model, images)
        return Prediction(answers.logits, {n: r.expert_ids for n, r in answers.routes.items()})

    return _Subject(
        path=stored.path,
        kind="run",
        engine="torch",
        precision="fp32",
        tf32=False,
        num_experts={rule.layer: rule.num_experts for rule in model.rules},
        infer=infer,
    )


def _evaluated(
    subject: _Subject, labelled: _Labelled, started: float, progress: Progress
) -> EvalReport:
    answered = ask(subject.infer, labelled.x_NCHW, labelled.labels_N, progress)
    return _report(subject, labelled, answered, started)


def _report(
    subject: _Subject, labelled: _Labelled, answered: Answered, started: float
) -> EvalReport:
    logits_NC, labels_N = answered.prediction.logits, answered.labels_N
    names, images, correct = labelled.class_names, len(labels_N), int(answered.right_N.sum())
    finite_N = np.isfinite(logits_NC).all(axis=1)
    answers_NC, known_N = logits_NC[finite_N], labels_N[finite_N]
    confusion_CC = confusion_of(answers_NC.argmax(axis=1), known_N, len(names))
    experts = expert_use(answered.prediction.expert_ids, subject.num_experts)
    images_C = np.bincount(labels_N, minlength=len(names))
    return EvalReport(
        model=str(subject.path),
        kind=subject.kind,
        engine=subject.engine,
        precision=subject.precision,
        tf32=subject.tf32,
        data=labelled.source,
        images=images,
        correct=correct,
        accuracy=correct / images,
        accuracy_interval=wilson_interval(correct, images),
        unanswered=int((~finite_N).sum()),
        classes=class_figures(confusion_CC, images_C, names),
        confusion=tuple(map(tuple, confusion_CC.tolist())),
        reliability=reliability_of(answers_NC, known_N) if len(known_N) else None,
        experts=experts,
        versions=installed_versions(),
        seconds=time.perf_counter() - started,
        warnings=of_routes({use.layer: use.expert_load for use in experts}),
    )

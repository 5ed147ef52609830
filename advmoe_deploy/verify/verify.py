"""Verification of a bundle: the same attacked images on the reference and on the engine.

First the answers are compared, image by image and in batches of every kind, and what differs is
named. Then white-box examples are made on the torch model, which is rebuilt from the bundle's own
``reference.safetensors``, and replayed on the engine; Square and RayS run on the engine itself and
their examples are replayed on the reference. An engine of lower precision, of fp32 that is rounded
to TF32, or whose answers differ is another function, which examples made elsewhere flatter: PGD,
along the reference's gradients, Square and RayS then ask both. An image counts as robust only if no
attack changed its answer.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count, islice
from pathlib import Path

import torch

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.files import require_writable
from advmoe_deploy.models.stored import reference_model, threat_or
from advmoe_deploy.parity.intervals import wilson_interval
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.reports.cautions import of_routes
from advmoe_deploy.runtime.runner import is_exact
from advmoe_deploy.runtime.select import backend_of, engine_for, open_runner, resolved
from advmoe_deploy.specs import AttackSpec, ModelSpec
from advmoe_deploy.verify.consistency import COMPARE, STEPS, inspect_answers
from advmoe_deploy.verify.examples.images import images_of, source_of
from advmoe_deploy.verify.examples.stored import write_examples
from advmoe_deploy.verify.examples.unfinished import go_on, keep, key_of
from advmoe_deploy.verify.masking import masking_signs, warnings_of
from advmoe_deploy.verify.report import AttackOutcome, FoundOn, RobustReport
from advmoe_deploy.verify.suites import Suite, attack_suite, restarts
from advmoe_deploy.verify.trial import Trial, searches_of
from advmoe_deploy.verify.verdict import chance_of, judge

Search = tuple[AttackSpec, FoundOn]


def verify_bundle(
    bundle: Bundle,
    *,
    engine: str | None = None,
    data: str | None = None,
    class_map: Mapping[str, str] | None = None,
    attacks: Suite = "quick",
    max_drop: float = 0.5,
    images: int | None = None,
    epsilon: float | None = None,
    threads: int = 0,
    allow_fragile: bool = False,
    measured: list[AttackOutcome] | None = None,
    examples: Path | None = None,
    resume: Path | None = None,
    budget: float = 0.0,
    progress: Progress | None = None,
) -> RobustReport:
    """Return what clean and attacked accuracy are on the reference and on ``engine``.

    Args:
        bundle: an opened bundle with its reference weights.
        engine: a name from ``runtime.select.ENGINES``, or ``NAME:PRECISION``; by default what the
            bundle was made for.
        data: a data source; by default the one the model was trained on. Its test split is used,
            its classes matched to the model's by name.
        class_map: the model's name of classes that ``data`` calls otherwise.
        attacks: the suite to run.
        max_drop: percentage points of clean or robust accuracy that the engine may lose.
        images: how many test images, all by default.
        epsilon: an l-inf radius in [0, 1] pixels; by default the one the model was trained for.
        threads: of the engine and of PyTorch; 0 leaves the choice to them.
        allow_fragile: whether a reference that withstands no more than chance may pass.
        measured: filled with the outcome of each attack as it ends, where a list is given.
        examples: a file to keep what each image fell to in, see ``verify.examples.stored``.
        resume: a file that keeps the state after each attack; if it is there, that goes on.
        budget: seconds of attacks: what the suite leaves of them goes into restarts; where they are
            over before it, the rest of it is left out, which is a warning. 0: the suite.
        progress: who listens.

    Raises:
        BundleError: the bundle holds no reference weights.
        UsageError: neither the bundle nor the caller names a threat model, or the data do not fit.
    """
    started = time.perf_counter()
    progress, measured = progress or Silent(), [] if measured is None else measured
    for kept in (examples, resume):
        if kept is not None:
            require_writable(kept)
    engine = engine_for(bundle, engine, progress.note)
    model = reference_model(bundle)
    threat = threat_or(epsilon, bundle.manifest.threat, bundle.path)
    manifest = bundle.manifest
    source = source_of(bundle, data)
    x_NCHW, labels_N = images_of(bundle, source, images, class_map)
    suite = attack_suite(attacks, bundle.manifest.model)
    with _torch_threads(threads), open_runner(bundle, engine, threads=threads) as runner:
        exported = bundle.manifest.parity
        with task(progress, COMPARE, STEPS):
            consistency = inspect_answers(
                model,
                runner,
                x_NCHW,
                labels_N,
                exact=is_exact(runner),
                rounding=exported.rounding,
                margin=exported.margin,
                least_route_agreement=_least_route_agreement(bundle, engine),
                decoding=manifest.decoding,
                progress=progress,
            )
        trial = Trial(model, runner, x_NCHW, labels_N, threat, progress)
        same = consistency.same_function
        searches = searches_of(suite, differs_from_reference=not same)
        key = key_of(bundle, engine, trial, searches)
        done = go_on(resume, key, trial) if resume is not None else 0
        measured.extend(trial.outcomes)
        before = sum(outcome.seconds for outcome in trial.outcomes)
        with task(progress, "verify", len(searches), min(done, len(searches))):
            attacked = _within(budget, trial, searches, bundle.manifest.model, same=same)
            for attack, found_on in islice(attacked, done, None):
                measured.append(trial.run(attack, found_on))
                if resume is not None:
                    keep(resume, key, trial)
                progress.advance("verify", robust_accuracy=measured[-1].robust_accuracy.engine)
        cut_short = _cut_short(budget, trial, searches)
        for line in cut_short:
            progress.note(line)
        masking = masking_signs(model, x_NCHW, labels_N, threat, trial.outcomes, progress)
    judgement = judge(
        trial,
        consistency.findings,
        max_drop=max_drop,
        same_function=same,
        chance=chance_of(labels_N, manifest.model.num_classes),
        allow_fragile=allow_fragile,
    )
    loads = {layer.layer: layer.expert_load for layer in consistency.parity.layers}
    report = RobustReport(
        passed=judgement.verdict == "passed",
        verdict=judgement.verdict,
        engine=engine,
        precision=runner.precision,
        tf32=runner.tf32,
        data=source,
        images=len(labels_N),
        threat=threat,
        max_drop=max_drop,
        clean_accuracy=trial.clean.shares,
        robust_accuracy=trial.standing.shares,
        robust_interval=wilson_interval(int(trial.standing.engine_N.sum()), len(labels_N)),
        clean_drop=judgement.clean,
        robust_drop=judgement.robust,
        reference=judgement.reference,
        allow_fragile=allow_fragile,
        transferred_accuracy=trial.transferred_accuracy,
        route_agreement=consistency.parity.route_agreement,
        consistency=consistency,
        warnings=(*cut_short, *judgement.warnings, *of_routes(loads), *warnings_of(masking)),
        masking=masking,
        attacks=tuple(trial.outcomes),
        seconds=before + time.perf_counter() - started,
    )
    if examples is not None:
        write_examples(examples, trial, report, bundle)
    return report


def _least_route_agreement(bundle: Bundle, engine: str) -> float:
    """Return the share of clear routes that the export asked of ``engine``; of fp32 all."""
    name, precision = resolved(bundle, engine)
    engines = bundle.engine_set(backend_of(name), precision)
    return engines.check.least_route_agreement if engines and engines.check else 1.0


def _within(
    budget: float, trial: Trial, searches: Sequence[Search], spec: ModelSpec, *, same: bool
) -> Iterator[Search]:
    """Yield ``searches``, then others from other starts, until ``budget`` seconds are over.

    Those are seconds of attacks; the first comes whatever it takes. Without a budget, 0, these are
    ``searches`` and no others.
    """
    others = (
        search
        for seed in count(1)
        for search in searches_of(restarts(spec, seed), differs_from_reference=not same)
    )
    for number, search in enumerate(chain(searches, others)):
        is_over = sum(outcome.seconds for outcome in trial.outcomes) >= budget
        if number and is_over and (budget or number >= len(searches)):
            return
        yield search


def _cut_short(budget: float, trial: Trial, searches: Sequence[Search]) -> list[str]:
    """Return what is to be said where the budget was over before the suite was."""
    if (left := len(searches) - len(trial.outcomes)) <= 0:
        return []
    return [
        f"the budget of {budget:g} s was over before the suite: {left} of {len(searches)} attacks "
        "were left out, so robust accuracy may be overstated; raise --budget"
    ]


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch compute on ``threads`` within the block; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

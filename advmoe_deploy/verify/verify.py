"""Verification of a bundle: the same attacked images on the reference and on the engine.

White-box examples are made on the torch model, which is rebuilt from the bundle's own
``reference.safetensors``, and replayed on the engine; Square runs on the engine itself and its
examples are replayed on the reference. An engine of lower precision, or of fp32 that is rounded to
TF32, is another function, which examples made elsewhere flatter: PGD, along the reference's
gradients, and Square then ask both. An image counts as robust only if no attack changed its answer.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from advmoe_deploy.attacks.black_box import TorchFace, attack_predictions
from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.matching import Trained, matching_test_images
from advmoe_deploy.data.registry import absolute
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.stored import fingerprint_in, reference_model, threat_or
from advmoe_deploy.parity.compare import is_right, predictions_of
from advmoe_deploy.parity.intervals import wilson_interval
from advmoe_deploy.parity.reference import compare_with_reference, reference_answers
from advmoe_deploy.parity.tolerance import same_experts
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.reports import AttackOutcome, FoundOn, Pair, RobustReport
from advmoe_deploy.runtime.runner import Runner, is_exact
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.specs import AttackSpec, ThreatModel
from advmoe_deploy.verify.suites import Suite, attack_suite

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


def verify_bundle(
    bundle: Bundle,
    *,
    engine: str = "onnxruntime",
    data: str | None = None,
    class_map: Mapping[str, str] | None = None,
    attacks: Suite = "quick",
    max_drop: float = 0.5,
    images: int | None = None,
    epsilon: float | None = None,
    threads: int = 0,
    measured: list[AttackOutcome] | None = None,
    progress: Progress | None = None,
) -> RobustReport:
    """Return what clean and attacked accuracy are on the reference and on ``engine``.

    Args:
        bundle: an opened bundle with its reference weights.
        engine: a name from ``runtime.select.ENGINES``, or ``NAME:PRECISION``.
        data: a data source; by default the one the model was trained on. Its test split is used,
            its classes matched to the model's by name.
        class_map: the model's name of classes that ``data`` calls otherwise.
        attacks: the suite to run.
        max_drop: percentage points of clean or robust accuracy that the engine may lose.
        images: how many test images, all by default.
        epsilon: an l-inf radius in [0, 1] pixels; by default the one the model was trained for.
        threads: of the engine and of PyTorch; 0 leaves the choice to them.
        measured: filled with the outcome of each attack as it ends, where a list is given.
        progress: who listens.

    Raises:
        BundleError: the bundle holds no reference weights.
        UsageError: neither the bundle nor the caller names a threat model, or the data do not fit.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    model = reference_model(bundle)
    threat = threat_or(epsilon, bundle.manifest.threat, bundle.path)
    manifest = bundle.manifest
    source = absolute(data or str(manifest.training.get("data", "")))
    known = fingerprint_in(manifest.training)
    trained = Trained(model.spec, manifest.class_names, manifest.decoding, known)
    x_NCHW, labels_N = matching_test_images(source, trained, images, class_map=class_map)
    suite = attack_suite(attacks, bundle.manifest.model)
    with _torch_threads(threads), open_runner(bundle, engine, threads=threads) as runner:
        trial = _Trial(model, runner, x_NCHW, labels_N, threat)
        searches = searches_of(suite, differs_from_reference=not is_exact(runner))
        with task(progress, "verify", len(searches)):
            for attack, found_on in searches:
                outcome = trial.run(attack, found_on)
                if measured is not None:
                    measured.append(outcome)
                progress.advance("verify", robust=outcome.robust_accuracy.engine)
        exported = bundle.manifest.parity
        parity = compare_with_reference(
            model, runner, x_NCHW, rounding=exported.rounding, margin=exported.margin
        )
    return RobustReport(
        passed=trial.worst_drop <= max_drop,
        engine=engine,
        precision=runner.precision,
        tf32=runner.tf32,
        data=source,
        images=len(labels_N),
        threat=threat,
        max_drop=max_drop,
        clean_accuracy=trial.clean_accuracy,
        robust_accuracy=trial.robust_accuracy,
        robust_interval=wilson_interval(int(trial.robust_on_engine_N.sum()), len(labels_N)),
        route_agreement=parity.route_agreement,
        parity=parity,
        attacks=tuple(trial.outcomes),
        seconds=time.perf_counter() - started,
    )


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch compute on ``threads`` within the block; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def searches_of(
    suite: Sequence[AttackSpec], *, differs_from_reference: bool
) -> list[tuple[AttackSpec, FoundOn]]:
    """Return each attack of ``suite`` with what its examples are found on, in order.

    ``differs_from_reference`` says that the engine is another function than the reference.
    """
    searches: list[tuple[AttackSpec, FoundOn]] = []
    for attack in suite:
        both = differs_from_reference and attack.name in ("pgd", "square")
        if both or attack.name != "square":
            searches.append((attack, "reference"))
        if both or attack.name == "square":
            searches.append((attack, "engine"))
    return searches


class _Trial:
    """The same images, clean and attacked, on a reference and on an engine."""

    def __init__(
        self,
        model: Classifier,
        runner: Runner,
        x_NCHW: Images,
        labels_N: Labels,
        threat: ThreatModel,
    ) -> None:
        self.model, self.runner, self.threat = model, runner, threat
        self.x_NCHW, self.labels_N = x_NCHW, labels_N
        self.outcomes: list[AttackOutcome] = []
        correct_on_reference_N, correct_on_engine_N, self.routes = self._answers(x_NCHW)
        self.clean_accuracy = _pair(correct_on_reference_N, correct_on_engine_N)
        self.robust_on_reference_N = correct_on_reference_N
        self.robust_on_engine_N = correct_on_engine_N

    @property
    def robust_accuracy(self) -> Pair:
        """Share of images that no attack so far has changed the answer of."""
        return _pair(self.robust_on_reference_N, self.robust_on_engine_N)

    @property
    def worst_drop(self) -> float:
        """Percentage points that the engine lost, clean or robust, whichever is more."""
        return max(map(drop_in_points, (self.clean_accuracy, self.robust_accuracy)))

    def run(self, attack: AttackSpec, found_on: FoundOn) -> AttackOutcome:
        """Attack every image and count what still stands."""
        started = time.perf_counter()
        adversarial_NCHW = self._find(attack, found_on)
        reference_N, engine_N, routes = self._answers(adversarial_NCHW)
        self.robust_on_reference_N = self.robust_on_reference_N & reference_N
        self.robust_on_engine_N = self.robust_on_engine_N & engine_N
        outcome = AttackOutcome(
            attack=attack,
            found_on=found_on,
            images=len(self.labels_N),
            robust_accuracy=_pair(reference_N, engine_N),
            route_flip_rate=_flip_rate(self.routes, routes),
            route_agreement=self._route_agreement(adversarial_NCHW, routes),
            seconds=time.perf_counter() - started,
        )
        self.outcomes.append(outcome)
        return outcome

    def _route_agreement(
        self, x_NCHW: Images, routes: dict[str, NDArray[np.int64]]
    ) -> float | None:
        """Return the share of images that go the same way in every layer."""
        if not routes:
            return None
        expected = reference_answers(self.model, x_NCHW).routes
        same = [
            same_experts(expected[layer].expert_ids, ids).reshape(len(ids), -1).all(axis=1)
            for layer, ids in routes.items()
        ]
        return float(np.all(same, axis=0).mean())

    def _find(self, attack: AttackSpec, found_on: FoundOn) -> Images:
        if attack.name == "square" and found_on == "engine":
            return attack_predictions(self._logits, self.x_NCHW, self.labels_N, self.threat, attack)
        x_NCHW, labels_N = torch.from_numpy(self.x_NCHW), torch.from_numpy(self.labels_N)
        answer = TorchFace(self._logits) if found_on == "engine" else None
        found = find_adversarial(self.model, x_NCHW, labels_N, self.threat, attack, answer=answer)
        return found.numpy()

    def _logits(self, x_NCHW: Images) -> NDArray[np.float32]:
        return self.runner.infer(x_NCHW).logits

    def _answers(
        self, x_NCHW: Images
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_], dict[str, NDArray[np.int64]]]:
        """Return what the reference and the engine get right, and the engine's routes."""
        reference_N = predict(self.model, torch.from_numpy(x_NCHW)).numpy()
        answer = predictions_of(self.runner, x_NCHW)
        engine_N = is_right(answer.logits, self.labels_N)
        return reference_N == self.labels_N, engine_N, answer.expert_ids


def drop_in_points(accuracy: Pair) -> float:
    """Return the percentage points that the engine lost, negative where it gained."""
    # Rounded, for 390 less 388 of 400 is half a point and not a hair more.
    return round(100 * (accuracy.reference - accuracy.engine), 9)


def _pair(reference_N: NDArray[np.bool_], engine_N: NDArray[np.bool_]) -> Pair:
    return Pair(reference=float(reference_N.mean()), engine=float(engine_N.mean()))


def _flip_rate(
    clean: dict[str, NDArray[np.int64]], attacked: dict[str, NDArray[np.int64]]
) -> float | None:
    """Return the share of images that, in some layer, go to other experts than before."""
    if not clean:
        return None
    changed = [
        (np.sort(ids, axis=-1) != np.sort(attacked[layer], axis=-1)).reshape(len(ids), -1)
        for layer, ids in clean.items()
    ]
    return float(np.concatenate(changed, axis=1).any(axis=1).mean())

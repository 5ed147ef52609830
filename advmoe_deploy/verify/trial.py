"""Trial of an engine beside its reference: the same images, attack after attack.

An attack gets the images that still stand; one whose answer was changed has fallen for good. What
was found on one side is replayed on the other, and counts there too.

Shapes: N images, of them A under attack, C channels, H height, W width.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from advmoe_deploy.attacks.black_box import NAMES, TorchFace, attack_predictions
from advmoe_deploy.attacks.effort import attack_task
from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.parity.answers import Flags, Images, Labels
from advmoe_deploy.parity.compare import is_right, predictions_of
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.parity.tolerance import same_experts
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.reports import Pair
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.specs import AttackSpec, ThreatModel
from advmoe_deploy.verify.report import AttackOutcome, FoundOn

Ids = Mapping[str, NDArray[np.int64]]

# Attacks that can ask an engine: by its answers alone, or with the reference's gradients.
_CAN_ASK = ("pgd", *NAMES)


def searches_of(
    suite: Sequence[AttackSpec], *, differs_from_reference: bool
) -> list[tuple[AttackSpec, FoundOn]]:
    """Return each attack of ``suite`` with what its examples are found on, in order.

    ``differs_from_reference`` says that the engine is another function than the reference: then it
    is asked itself, once the reference has nothing more to tell.
    """
    if not differs_from_reference:
        return [(a, "engine" if a.name in NAMES else "reference") for a in suite]
    own = [attack for attack in suite if attack.name in _CAN_ASK]
    return [*((attack, "reference") for attack in suite), *((attack, "engine") for attack in own)]


@dataclass
class Sides:
    """Flags of each image [N] on the reference and on the engine."""

    reference_N: Flags
    engine_N: Flags

    @property
    def shares(self) -> Pair:
        """Share of the images it holds of."""
        return Pair(reference=float(self.reference_N.mean()), engine=float(self.engine_N.mean()))


@dataclass
class Examples:
    """The adversarial image that each image fell to first; an attack of -1 stands for none."""

    images_NCHW: Images
    attack_N: NDArray[np.int64]
    fooled: Sides = field(init=False)

    def __post_init__(self) -> None:
        nobody = np.zeros(len(self.attack_N), dtype=bool)
        self.fooled = Sides(nobody, nobody.copy())


class Trial:
    """Images, clean and attacked, on a reference and on an engine."""

    def __init__(
        self,
        model: Classifier,
        runner: Runner,
        x_NCHW: Images,
        labels_N: Labels,
        threat: ThreatModel,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.runner, self.threat = model, runner, threat
        self.progress = progress or Silent()
        self.x_NCHW, self.labels_N = x_NCHW, labels_N
        self.outcomes: list[AttackOutcome] = []
        everyone_N = np.arange(len(labels_N))
        self.clean, self.routes = self._answers(x_NCHW, everyone_N)
        self.standing = Sides(self.clean.reference_N.copy(), self.clean.engine_N.copy())
        self._withstood_replay_N = self.clean.engine_N.copy()
        self.examples = Examples(x_NCHW.copy(), np.full(len(labels_N), -1))

    @property
    def transferred_accuracy(self) -> float:
        """The engine's accuracy on what was found on the reference alone."""
        return float(self._withstood_replay_N.mean())

    def state(self) -> dict[str, NDArray[Any]]:
        """Return what the attacks so far did, as arrays; :meth:`restore` takes them back."""
        return {
            "images": self.examples.images_NCHW,
            "attack": self.examples.attack_N,
            "fooled_reference": self.examples.fooled.reference_N,
            "fooled_engine": self.examples.fooled.engine_N,
            "withstood_replay": self._withstood_replay_N,
        }

    def restore(self, state: Mapping[str, NDArray[Any]], outcomes: Sequence[AttackOutcome]) -> None:
        """Go back to ``state``, which ``outcomes`` led to.

        Raises:
            KeyError: an array is missing.
            ValueError: one is of another shape or kind.
        """
        for name, mine in self.state().items():
            theirs = state[name]
            if (theirs.shape, theirs.dtype) != (mine.shape, mine.dtype):
                raise ValueError(f"{name} is {theirs.dtype} {theirs.shape}")
            mine[...] = theirs
        fooled = self.examples.fooled
        self.standing = Sides(
            self.clean.reference_N & ~fooled.reference_N, self.clean.engine_N & ~fooled.engine_N
        )
        self.outcomes = list(outcomes)

    def run(self, attack: AttackSpec, found_on: FoundOn) -> AttackOutcome:
        """Attack the images that stand on either side and count what withstands."""
        started = time.perf_counter()
        standing = self.standing
        rows_A = np.flatnonzero(standing.reference_N | standing.engine_N)
        found = self._find(attack, found_on, rows_A)
        right, routes = self._answers(found, rows_A)
        self._fall(rows_A, found, right)
        if found_on == "reference":
            self._withstood_replay_N[rows_A] &= right.engine_N
        outcome = AttackOutcome(
            attack=attack,
            found_on=found_on,
            images=len(rows_A),
            robust_accuracy=standing.shares,
            route_flip_rate=self._flip_rate(rows_A, routes),
            route_agreement=self._route_agreement(found, routes),
            seconds=time.perf_counter() - started,
        )
        self.outcomes.append(outcome)
        return outcome

    def _fall(self, rows_A: NDArray[np.int64], found: Images, right: Sides) -> None:
        standing, examples = self.standing, self.examples
        fell_A = np.zeros(len(rows_A), dtype=bool)
        for held_N, right_A, fooled_N in (
            (standing.reference_N, right.reference_N, examples.fooled.reference_N),
            (standing.engine_N, right.engine_N, examples.fooled.engine_N),
        ):
            # An image that was wrong before any attack did not fall to this one.
            turned_A = held_N[rows_A] & ~right_A
            held_N[rows_A] &= right_A
            fooled_N[rows_A] |= turned_A
            fell_A |= turned_A
        first_A = fell_A & (examples.attack_N[rows_A] < 0)
        examples.attack_N[rows_A[first_A]] = len(self.outcomes)
        examples.images_NCHW[rows_A[first_A]] = found[first_A]

    def _find(self, attack: AttackSpec, found_on: FoundOn, rows_A: NDArray[np.int64]) -> Images:
        x_NCHW, labels_N = self.x_NCHW[rows_A], self.labels_N[rows_A]
        with attack_task(self.progress, self.model, attack, len(rows_A)) as passed:
            if attack.name in NAMES and found_on == "engine":

                def logits(asked_NCHW: Images) -> NDArray[np.float32]:
                    passed(len(asked_NCHW))
                    return self._logits(asked_NCHW)

                return attack_predictions(logits, x_NCHW, labels_N, self.threat, attack)
            return find_adversarial(
                self.model,
                torch.from_numpy(x_NCHW),
                torch.from_numpy(labels_N),
                self.threat,
                attack,
                answer=TorchFace(self._logits) if found_on == "engine" else None,
                first_only=True,
            ).numpy()

    def _logits(self, x_NCHW: Images) -> NDArray[np.float32]:
        return self.runner.infer(x_NCHW).logits

    def _answers(self, x_NCHW: Images, rows_A: NDArray[np.int64]) -> tuple[Sides, Ids]:
        """Return where both sides are right about images of ``rows_A``, and the engine's routes."""
        labels_A = self.labels_N[rows_A]
        if not len(rows_A):
            return Sides(np.zeros(0, bool), np.zeros(0, bool)), {}
        reference_A = predict(self.model, torch.from_numpy(x_NCHW)).numpy()
        answer = predictions_of(self.runner, x_NCHW)
        return Sides(reference_A == labels_A, is_right(answer.logits, labels_A)), answer.expert_ids

    def _flip_rate(self, rows_A: NDArray[np.int64], routes: Ids) -> float | None:
        """Return the share of images that, in some layer, go to other experts than before."""
        if not routes:
            return None
        changed = [
            _rows_of(ids, len(rows_A))
            != _rows_of(_of_images(self.routes[layer], rows_A, len(self.labels_N)), len(rows_A))
            for layer, ids in routes.items()
        ]
        return float(np.concatenate(changed, axis=1).any(axis=1).mean())

    def _route_agreement(self, x_NCHW: Images, routes: Ids) -> float | None:
        """Return the share of images that both sides send the same way in every layer."""
        if not routes:
            return None
        expected = reference_answers(self.model, x_NCHW).routes
        same = [
            same_experts(expected[layer].expert_ids, ids).reshape(len(x_NCHW), -1).all(axis=1)
            for layer, ids in routes.items()
        ]
        return float(np.all(same, axis=0).mean())


def _of_images(ids: NDArray[np.int64], rows_A: NDArray[np.int64], images: int) -> NDArray[np.int64]:
    return ids.reshape(images, -1, ids.shape[-1])[rows_A]


def _rows_of(ids: NDArray[np.int64], images: int) -> NDArray[np.int64]:
    """Return the experts [images, rows * K] that each image meets, in no order within a row."""
    return np.sort(ids, axis=-1).reshape(images, -1)

"""Adversarial objectives: loss and examples of a step, one class per loss.

trades      CE(f(x), y) + beta * KL(f(x) || f(x')), x' by PGD on the KL term
pgd-at      CE(f(x'), y), x' by PGD on the cross-entropy from a random start
n-fgsm      CE(f(x'), y), x' one step from a noisy image, not clipped to the ball
fast        CE(f(x'), y), x' one step from a random start, clipped to the ball
free        CE(f(x'), y), x' moved by the very gradient that trains
standard    CE(f(x), y)

An objective sees the model through a :class:`TrainingScene` alone and keeps nothing between steps.

Shapes: N images, C channels, H height, W width, K classes, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.attacks.pgd import ascend, pgd_kl, project
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.specs import ThreatModel
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.data.loader import BatchPart
from advmoe_deploy.train.objectives.forward import ForwardPass
from advmoe_deploy.train.objectives.losses import trades

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TrainingScene:
    """One part of a batch, and how to run the model on it: to attack it, and to train it."""

    model: Classifier
    part: BatchPart
    attacked: ForwardPass
    trained: ForwardPass


class TrainingObjective(Protocol):
    """A loss and its examples: :meth:`find` gives them, :meth:`loss` is minimised on them.

    Where it ``moves_examples``, the gradient of a training step moves them as well.
    """

    moves_examples: ClassVar[bool] = False

    def find(self, scene: TrainingScene) -> Tensor:
        """Return the examples; parameters want no gradient meanwhile."""

    def loss(self, scene: TrainingScene, examples: Tensor) -> Tensor:
        """Return the mean loss over the part's rows, a scalar: by default the cross-entropy."""
        return F.cross_entropy(scene.trained(examples), scene.part.labels)

    def moved(self, examples: Tensor, gradient: Tensor, images: Tensor) -> Tensor:
        """Return the examples of the next repeat of a batch, by default the same."""
        return examples


@dataclass(frozen=True)
class InnerAttack:
    """The PGD of training: ``noise`` is the deviation of a start by the divergence."""

    threat: ThreatModel
    steps: int
    step_size: float
    noise: float

    def on_divergence(self, forward: Forward, part: BatchPart) -> Tensor:
        """Return the images that change most what ``forward`` gives, as TRADES wants them."""
        start = part.images + self.noise * part.rng.normal(part.images)
        start = project(start, part.images, self.threat.epsilon)
        return pgd_kl(
            forward,
            part.images,
            start,
            threat=self.threat,
            steps=self.steps,
            step_size=self.step_size,
        )

    def on_cross_entropy(self, forward: Forward, part: BatchPart) -> Tensor:
        """Return images of high cross-entropy, from a uniform start (Madry et al., ICLR 2018)."""
        epsilon = self.threat.epsilon
        start = project(part.images + epsilon * part.rng.uniform(part.images), part.images, epsilon)
        return ascend(
            lambda x: F.cross_entropy(forward(x), part.labels, reduction="sum"),
            part.images,
            start,
            threat=self.threat,
            steps=self.steps,
            step_size=self.step_size,
        )


@dataclass(frozen=True)
class Trades(TrainingObjective):
    """TRADES (Zhang et al., ICML 2019)."""

    ascent: InnerAttack
    beta: float

    def find(self, scene: TrainingScene) -> Tensor:
        """Return images that change the model's answer most."""
        return self.ascent.on_divergence(scene.attacked, scene.part)

    def loss(self, scene: TrainingScene, examples: Tensor) -> Tensor:
        """Return TRADES."""
        # One pass over both halves: BatchNorm trains on the mixture that it will meet.
        clean_NK, adversarial_NK = scene.trained(torch.cat([scene.part.images, examples])).chunk(2)
        return trades(clean_NK, adversarial_NK, scene.part.labels, self.beta)


@dataclass(frozen=True)
class PgdAt(TrainingObjective):
    """Adversarial training (Madry et al., ICLR 2018): cross-entropy of PGD's examples."""

    ascent: InnerAttack

    def find(self, scene: TrainingScene) -> Tensor:
        """Return images of high cross-entropy."""
        return self.ascent.on_cross_entropy(scene.attacked, scene.part)


@dataclass(frozen=True)
class SingleStep(TrainingObjective):
    """One signed gradient step from x + ``start`` * epsilon * U(-1, 1).

    ``clipped`` to the ball it is fast adversarial training (Wong et al., ICLR 2020, start 1, step
    1.25 epsilon), not clipped N-FGSM (de Jorge et al., NeurIPS 2022, start k, step epsilon), whose
    examples are up to (k + 1) epsilon away. Pixels stay in [0, 1] either way.
    """

    threat: ThreatModel
    start: float
    step_size: float
    clipped: bool

    def find(self, scene: TrainingScene) -> Tensor:
        """Return the images one step away."""
        part, epsilon = scene.part, self.threat.epsilon
        noise = self.start * epsilon * part.rng.uniform(part.images)
        x = (part.images + noise).clamp(0, 1).requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(scene.attacked(x), part.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        moved = (x.detach() + self.step_size * gradient.sign()).clamp(0, 1)
        return project(moved, part.images, epsilon) if self.clipped else moved


@dataclass(frozen=True)
class Free(TrainingObjective):
    """Free adversarial training (Shafahi et al., NeurIPS 2019).

    The gradient of a training step moves the weights and, once more, the images; the learner
    repeats each batch. Unlike the paper's, the perturbation is drawn anew for each batch, uniform
    in the ball, so that nothing but the weights crosses from one batch, or epoch, to the next.
    """

    moves_examples = True

    threat: ThreatModel
    step_size: float

    def find(self, scene: TrainingScene) -> Tensor:
        """Return the start of a new batch."""
        images, epsilon = scene.part.images, self.threat.epsilon
        return project(images + epsilon * scene.part.rng.uniform(images), images, epsilon)

    def moved(self, examples: Tensor, gradient: Tensor, images: Tensor) -> Tensor:
        """Return the examples of the next repeat."""
        stepped = examples.detach() + self.step_size * gradient.sign()
        return project(stepped, images, self.threat.epsilon)


@dataclass(frozen=True)
class Standard(TrainingObjective):
    """Cross-entropy of clean images."""

    def find(self, scene: TrainingScene) -> Tensor:
        """Return the images as they are."""
        return scene.part.images


def objective_of(config: TrainConfig) -> TrainingObjective:
    """Return the objective of ``config.loss``."""
    threat, epsilon = config.threat, config.threat.epsilon
    match config.loss:
        case "trades":
            return Trades(ascent_of(config), config.beta)
        case "pgd-at":
            return PgdAt(ascent_of(config))
        case "n-fgsm":
            return SingleStep(
                threat, config.nfgsm_noise, config.attack_step_size or epsilon, clipped=False
            )
        case "fast":
            return SingleStep(threat, 1, config.attack_step_size or 1.25 * epsilon, clipped=True)
        case "free":
            return Free(threat, config.attack_step_size or epsilon)
        case "standard":
            return Standard()


def ascent_of(config: TrainConfig) -> InnerAttack:
    """Return the PGD of ``config``; a step is by default 2.5 * epsilon / steps."""
    default = 2.5 * config.threat.epsilon / config.attack_steps
    return InnerAttack(
        config.threat,
        config.attack_steps,
        config.attack_step_size or default,
        config.attack_noise,
    )

"""Randomized smoothing: an l2 certificate for any classifier, routed ones included.

Cohen, Rosenfeld and Kolter, "Certified adversarial robustness via randomized smoothing", ICML 2019
(arXiv 1902.02918). The *smoothed* classifier answers with the class that the model gives most often
under Gaussian noise. If that class has probability above p >= 1/2, no change of l2 norm below
sigma * Phi^-1(p) turns the smoothed answer; p is the Clopper-Pearson lower bound of a count, so
each certificate is wrong with probability at most ``alpha``.

It is about the smoothed classifier, not about the model as exported. Noise is not clipped.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from advmoe_deploy.analysis.shares import Share, share_of
from advmoe_deploy.analysis.vacuous import is_vacuous
from advmoe_deploy.attacks.pgd import eval_mode
from advmoe_deploy.errors import CheckFailedError, missing_extra
from advmoe_deploy.journal import continued
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import state_of
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.specs import Frozen

_BATCH = 250  # fixed: the noise depends on how it is drawn
_SEEDS_APART = 1_000_003
_CURVE_POINTS = 41


class Smoothing(Frozen):
    """Parameters of a certificate: ``n0`` samples pick the class, ``n`` others count it.

    Noise is N(0, sigma^2), ``sigma`` in [0, 1] pixels. The radius is at most
    sigma * Phi^-1(alpha ** (1 / n)).
    """

    sigma: float = Field(0.25, gt=0, allow_inf_nan=False)
    n0: int = Field(100, ge=1)
    n: int = Field(1000, ge=1)
    alpha: float = Field(0.001, gt=0, lt=1)
    seed: int = Field(0, ge=0)


class CertifiedImage(Frozen):
    """One image: the smoothed answer, ``None`` if it abstains, and the l2 radius it holds for."""

    image: int
    label: int
    answer: int | None
    count: int
    radius: float

    @property
    def correct(self) -> bool:
        """True if the smoothed answer is right."""
        return self.answer == self.label


class CurveOfRadii(Frozen):
    """Certified accuracy over l2 radius: the share of images right within each radius."""

    radius: tuple[float, ...]
    accuracy: tuple[float, ...]


class SmoothingReport(Frozen):
    """Certificates of the smoothed classifier. ``abstained`` counts images.

    ``vacuous``: no right answer has a radius that reaches another image of 8 bits.
    """

    settings: Smoothing
    images: int
    accuracy: Share
    abstained: int
    mean_radius: float
    largest_radius: float
    curve: CurveOfRadii
    certified: tuple[CertifiedImage, ...]
    vacuous: bool = False


def lower_confidence_bound(count: int, trials: int, alpha: float) -> float:
    """Return the one-sided Clopper-Pearson bound: above the true share with chance ``alpha``."""
    if count == 0:
        return 0.0
    return float(_stats().beta.ppf(alpha, count, trials - count + 1))


def l2_radius(count: int, settings: Smoothing) -> float:
    """Return the radius that ``count`` of ``settings.n`` samples certify; 0 means to abstain."""
    share = lower_confidence_bound(count, settings.n, settings.alpha)
    return settings.sigma * float(_stats().norm.ppf(share)) if share > 0.5 else 0.0


def certify(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    settings: Smoothing,
    *,
    first: int | None = None,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> SmoothingReport:
    """Return the certificate of each float image [N, C, H, W] in [0, 1], or of the ``first`` ones.

    Each image has a seed of its own, so how many there are changes no other. With ``journal``, a
    file, every certified image is written there at once and a later call for the same job, of
    whatever ``first``, continues after the last whole line, with the same result; a journal of
    another job is begun anew.

    Raises:
        CheckFailedError: the model's answers are not finite.
        UsageError: another process uses the journal.
    """
    progress = progress or Silent()
    kept, rows = continued(journal, _job(model, images, labels, settings))
    with kept, eval_mode(model), torch.no_grad():
        count = len(labels) if first is None else first
        done = [CertifiedImage.model_validate(row) for row in rows[:count]]
        with task(progress, "smoothing", count, len(done)):
            for index in range(len(done), count):
                image = _certified(model, images[index], int(labels[index]), index, settings)
                kept.append(image.model_dump())
                done.append(image)
                progress.advance("smoothing", radius=image.radius)
    return _report(done, settings)


def _certified(
    model: Classifier, image: Tensor, label: int, index: int, settings: Smoothing
) -> CertifiedImage:
    generator = torch.Generator().manual_seed((settings.seed * _SEEDS_APART + index) % (1 << 64))
    guess = int(_counts(model, image, settings.n0, settings.sigma, generator).argmax())
    count = int(_counts(model, image, settings.n, settings.sigma, generator)[guess])
    radius = l2_radius(count, settings)
    answer = guess if radius > 0 else None
    return CertifiedImage(image=index, label=label, answer=answer, count=count, radius=radius)


def _counts(
    model: Classifier, image: Tensor, samples: int, sigma: float, generator: torch.Generator
) -> Tensor:
    """Return how often each class is the answer under ``samples`` noises, int64 [K]."""
    total = torch.zeros(model.spec.num_classes, dtype=torch.int64)
    for start in range(0, samples, _BATCH):
        shape = (min(_BATCH, samples - start), *image.shape)
        noise = torch.randn(shape, generator=generator).to(image)
        logits = model(image + sigma * noise)
        if not bool(torch.isfinite(logits).all()):
            raise CheckFailedError(
                "the model's answers under noise are not finite; "
                "use an earlier checkpoint or train again"
            )
        total += torch.bincount(logits.argmax(dim=1).cpu(), minlength=len(total))
    return total


def _report(done: Sequence[CertifiedImage], settings: Smoothing) -> SmoothingReport:
    right_N = torch.tensor([image.correct for image in done])
    radius_N = torch.tensor([image.radius for image in done], dtype=torch.float64)
    largest = l2_radius(settings.n, settings)
    grid = torch.linspace(0, largest, _CURVE_POINTS, dtype=torch.float64)
    held_GN = right_N & (radius_N >= grid[:, None])
    return SmoothingReport(
        settings=settings,
        images=len(done),
        accuracy=share_of(right_N),
        abstained=sum(image.answer is None for image in done),
        mean_radius=float((radius_N * right_N).mean()),
        largest_radius=largest,
        curve=CurveOfRadii(
            radius=tuple(grid.tolist()), accuracy=tuple(held_GN.double().mean(dim=1).tolist())
        ),
        certified=tuple(done),
        vacuous=is_vacuous(radius_N[right_N]),
    )


def _job(model: Classifier, images: Tensor, labels: Tensor, settings: Smoothing) -> dict[str, Any]:
    digest = hashlib.sha256(model.spec.model_dump_json().encode())
    for tensor in (*state_of(model).values(), images.cpu(), labels.cpu()):
        digest.update(tensor.contiguous().numpy().tobytes())
    return {"job": digest.hexdigest(), "images": len(labels), **settings.model_dump()}


def _stats() -> Any:
    try:
        import scipy.stats
    except ImportError:
        raise missing_extra("scipy", "train") from None
    return scipy.stats

"""Projected gradient ascent in the l-infinity ball, on any objective.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.specs import AttackSpec, ThreatModel


class Ascent(NamedTuple):
    """State of an ascent: the direction to go, each image's loss, and who is fooled."""

    gradient_NCHW: Tensor
    loss_N: Tensor
    fooled_N: Tensor


class Objective(Protocol):
    """Objective that an attack ascends: ``objective(images, labels, rows) -> Ascent``."""

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, rows_N: Tensor, /) -> Ascent:
        """Return the ascent at ``images_NCHW``, which stand for ``rows_N`` of a batch."""


def step_size_of(attack: AttackSpec, threat: ThreatModel) -> float:
    """Return the step in [0, 1] pixels; 2.5 * epsilon / steps unless the attack names one."""
    return attack.step_size or 2.5 * threat.epsilon / attack.steps


def step_sizes_of(attack: AttackSpec, threat: ThreatModel) -> list[float]:
    """Return the size of each step in [0, 1] pixels: all the same, or falling from epsilon."""
    if not attack.decay:
        return [step_size_of(attack, threat)] * attack.steps
    return [threat.epsilon * (1 - step / attack.steps) for step in range(attack.steps)]


def project(x_NCHW: Tensor, around_NCHW: Tensor, epsilon: float) -> Tensor:
    """Return ``x_NCHW`` brought into the ball around ``around_NCHW`` and into [0, 1]."""
    low, high = (around_NCHW - epsilon).clamp_(min=0), (around_NCHW + epsilon).clamp_(max=1)
    return x_NCHW.clamp(low, high)


def random_start(images_NCHW: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    """Return points drawn uniformly from the ball; ``generator`` is on the CPU."""
    noise = torch.rand(images_NCHW.shape, generator=generator).mul_(2).sub_(1).mul_(epsilon)
    return project(images_NCHW + noise.to(images_NCHW), images_NCHW, epsilon)


def ascend(
    loss: Callable[[Tensor], Tensor],
    images_NCHW: Tensor,
    start_NCHW: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
) -> Tensor:
    """Return the last of ``steps`` signed gradient steps up ``loss``, a sum over the images.

    Each step ends in the ball around ``images_NCHW`` and in [0, 1]; ``start_NCHW`` is taken as it
    is. Training wants the last iterate; :func:`pgd_search` keeps the worst.
    """
    x_NCHW = start_NCHW
    for _ in range(steps):
        x_NCHW = x_NCHW.detach().requires_grad_(True)
        with torch.enable_grad():
            total = loss(x_NCHW)
        (gradient,) = torch.autograd.grad(total, x_NCHW)
        moved = x_NCHW.detach() + step_size * gradient.sign()
        x_NCHW = project(moved, images_NCHW, threat.epsilon)
    return x_NCHW


def pgd_kl(
    forward: Callable[[Tensor], Tensor],
    images_NCHW: Tensor,
    start_NCHW: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
) -> Tensor:
    """Return the adversarial images that TRADES trains on.

    They ascend KL(f(x) || f(x')), whose target is fixed; in log space, so that no probability
    underflows. At ``images_NCHW`` itself the gradient is zero, so they start beside it.
    """
    with torch.no_grad():
        target_NK = F.log_softmax(forward(images_NCHW), dim=1)

    def divergence(x_NCHW: Tensor) -> Tensor:
        log_p_NK = F.log_softmax(forward(x_NCHW), dim=1)
        return F.kl_div(log_p_NK, target_NK, reduction="sum", log_target=True)

    return ascend(
        divergence, images_NCHW, start_NCHW, threat=threat, steps=steps, step_size=step_size
    )


def pgd_search(
    objective: Objective,
    images_NCHW: Tensor,
    labels_N: Tensor,
    start_NCHW: Tensor,
    *,
    rows_N: Tensor,
    threat: ThreatModel,
    step_sizes: Sequence[float],
    momentum: float = 0.0,
    first_only: bool = False,
) -> Tensor:
    """Return the worst images met for ``rows_N`` of a batch; the other rows come back as they are.

    Worst is, among the iterates that fool the model, the one of the highest loss; an image that
    nothing fooled keeps its highest loss. ``first_only`` stops working on an image at the first
    iterate that fools: the same count of fooled images, for less work. With ``momentum`` the
    direction is the gradient, brought to one size for all images, plus that share of the last.
    """
    worst = _Worst(images_NCHW)
    x_NCHW, direction_NCHW = start_NCHW[rows_N], None
    for step_size in (*step_sizes, 0.0):
        ascent = objective(x_NCHW, labels_N[rows_N], rows_N)
        worst.offer(rows_N, x_NCHW, ascent)
        gradient_NCHW = ascent.gradient_NCHW
        if momentum:
            gradient_NCHW = unit(gradient_NCHW)
            if direction_NCHW is not None:
                gradient_NCHW = gradient_NCHW + momentum * direction_NCHW
            direction_NCHW = gradient_NCHW
        x_NCHW = x_NCHW + step_size * gradient_NCHW.sign()
        if first_only:
            left = ~ascent.fooled_N
            rows_N, x_NCHW = rows_N[left], x_NCHW[left]
            direction_NCHW = None if direction_NCHW is None else direction_NCHW[left]
        if not len(rows_N):
            break
        x_NCHW = project(x_NCHW, images_NCHW[rows_N], threat.epsilon)
    return worst.images_NCHW


def unit(gradient_NCHW: Tensor) -> Tensor:
    """Return the gradient of each image at a mean size of 1; one that is zero stays so."""
    size = gradient_NCHW.abs().mean(dim=(1, 2, 3), keepdim=True)
    return gradient_NCHW / size.clamp(min=1e-20)


class _Worst:
    """The worst image met so far, row by row."""

    def __init__(self, images_NCHW: Tensor) -> None:
        n, device = len(images_NCHW), images_NCHW.device
        self.images_NCHW = images_NCHW.clone()
        self.fooled_N = torch.zeros(n, dtype=torch.bool, device=device)
        self._loss_N = torch.full((n,), -torch.inf, device=device)

    def offer(self, rows_N: Tensor, x_NCHW: Tensor, ascent: Ascent) -> None:
        """Keep the rows of ``x_NCHW`` that are worse than what is kept."""
        fooled_before = self.fooled_N[rows_N]
        higher = ascent.loss_N > self._loss_N[rows_N]
        better = torch.where(fooled_before == ascent.fooled_N, higher, ascent.fooled_N)
        rows_N = rows_N[better]
        self.images_NCHW[rows_N] = x_NCHW[better]
        self._loss_N[rows_N] = ascent.loss_N[better].to(self._loss_N)
        self.fooled_N[rows_N] = ascent.fooled_N[better]


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put ``module`` in eval mode for the block; each submodule's own mode comes back."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training

"""RayS: an l-infinity attack that asks for nothing but whether the label is still the answer.

Source: J. Chen and Q. Gu, RayS, KDD 2020 (arXiv 2006.12792). A direction is a sign for every value
of the image, and its radius how far along it the answer changes first. The search flips the signs
of ever smaller blocks and keeps a flip that shortens the radius. Beyond the paper, it begins anew
from signs drawn at random once no block helps, as happens to small images.

Shapes: N images, of them A left, C channels, H height, W width, D = C * H * W values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from advmoe_deploy.attacks.pgd import project

# Whether each of float images [n, C, H, W] is answered otherwise than by its label [n]: bool [n].
Fooled = Callable[[Tensor, Tensor], Tensor]

# How much a radius has to shrink to count, as a share of epsilon; the paper's 1e-3 at 8/255.
_RESOLUTION = 1 / 32
_FARTHEST = 1.0  # there every value is at 0 or at 1
_STARTS = 10_000  # more than one search makes, so that other seeds have other directions


def rays(
    fooled: Fooled, images: Tensor, labels: Tensor, *, epsilon: float, queries: int, seed: int
) -> Tensor:
    """Return adversarial images [N, C, H, W] by RayS, on the device of ``images``.

    Each image is asked about at most ``queries`` times, the first time as it is, and no longer once
    its radius is within ``epsilon``. What is asked lies in [0, 1], maybe outside the ball; what
    comes back is in both: the image that was found to fool, else the clean one. The same seed finds
    the same, and no image depends on the others.

    Args:
        fooled: gets float images [n, C, H, W] and their labels [n], n from 1 to N, and returns
            which are answered otherwise, bool [n].
        images: float images [N, C, H, W] in [0, 1].
        labels: int64 [N].
        epsilon: l-inf radius in [0, 1] pixels.
        queries: the most questions about one image.
        seed: of the directions from which an image begins anew.
    """
    result = images.clone()
    if not len(images):
        return result
    left_N = (~fooled(images, labels)).nonzero()[:, 0]
    search = _Search(images[left_N], epsilon, seed)
    for _ in range(queries - 1):
        if not len(left_N):
            break
        asked_ACHW = search.candidates()
        done_A = search.learn(fooled(asked_ACHW, labels[left_N]))
        result[left_N[done_A]] = asked_ACHW[done_A]
        left_N = left_N[~done_A]
        search.keep(~done_A)
    return result


@dataclass
class _State:
    """State of the search for each image left.

    ``signs_AD`` is the best direction, ``radius_A`` its radius or infinity while none fools, and
    ``flip_A`` the block that is being tried. While ``halving_A``, the new direction fools at
    ``high_A`` and not at ``low_A``. ``since_A`` counts the blocks tried since one was kept, and
    ``start_A`` how often the image began anew.
    """

    images_ACHW: Tensor
    signs_AD: Tensor
    radius_A: Tensor
    flip_A: Tensor
    halving_A: Tensor
    low_A: Tensor
    high_A: Tensor
    since_A: Tensor
    start_A: Tensor


class _Search:
    """One question about every image left at a time; each image is at a step of its own."""

    def __init__(self, images_ACHW: Tensor, epsilon: float, seed: int) -> None:
        flat_AD = images_ACHW.flatten(1)
        zeros_A = torch.zeros_like(flat_AD[:, 0])
        self._epsilon, self._least, self._seed = epsilon, epsilon * _RESOLUTION, seed
        blocks = torch.tensor(list(_blocks(flat_AD.shape[1])), device=flat_AD.device)
        self._begin_B, self._end_B = blocks.unbind(1)
        self._at = _State(
            images_ACHW=images_ACHW,
            signs_AD=torch.ones_like(flat_AD),
            radius_A=torch.full_like(zeros_A, torch.inf),
            flip_A=zeros_A.long(),
            halving_A=zeros_A.bool(),
            low_A=zeros_A.clone(),
            high_A=zeros_A.clone(),
            since_A=zeros_A.long(),
            start_A=zeros_A.long(),
        )

    def candidates(self) -> Tensor:
        """Return what to ask next of each image left [A, C, H, W]."""
        images_ACHW = self._at.images_ACHW
        step_AD = self._signs() * self._radius()[:, None]
        asked_ACHW = images_ACHW + step_AD.view_as(images_ACHW)
        # At epsilon it is to lie in the ball as everybody's projection has it.
        within = project(asked_ACHW, images_ACHW, self._epsilon)
        inside_A = self._radius() <= self._epsilon
        return torch.where(inside_A[:, None, None, None], within, asked_ACHW.clamp(0, 1))

    def learn(self, fooled_A: Tensor) -> Tensor:
        """Take in which candidates fool; return those that lie in the ball besides, bool [A]."""
        at, asked_A, signs_AD = self._at, self._radius(), self._signs()
        at.low_A = torch.where(at.halving_A & ~fooled_A, asked_A, at.low_A)
        at.high_A = torch.where(fooled_A, asked_A, at.high_A)
        at.halving_A = at.halving_A | fooled_A
        kept_A = at.halving_A & (at.high_A - at.low_A <= self._least)
        at.signs_AD = torch.where(kept_A[:, None], signs_AD, at.signs_AD)
        at.radius_A = torch.where(kept_A, at.high_A, at.radius_A)
        at.since_A = torch.where(kept_A, 0, at.since_A + (~at.halving_A).long())
        self._try_next(kept_A | ~at.halving_A)
        return fooled_A & (asked_A <= self._epsilon)

    def _try_next(self, rows_A: Tensor) -> None:
        """Go on to the next block, or to another direction where none has helped."""
        at = self._at
        # Block 0 flips nothing: it is the first direction itself, which is tried but once.
        following_A = at.flip_A % (len(self._begin_B) - 1) + 1
        at.flip_A = torch.where(rows_A, following_A, at.flip_A)
        at.low_A = at.low_A.masked_fill(rows_A, 0)
        at.halving_A = at.halving_A & ~rows_A
        self._begin_anew((at.since_A >= len(self._begin_B)).nonzero()[:, 0])

    def keep(self, rows_A: Tensor) -> None:
        """Go on with the images of ``rows_A``, bool [A], alone."""
        kept = {field.name: getattr(self._at, field.name)[rows_A] for field in fields(_State)}
        self._at = _State(**kept)

    def _begin_anew(self, stuck_A: Tensor) -> None:
        """Give the images ``stuck_A`` another direction, the same to all at the same start."""
        at = self._at
        at.start_A[stuck_A] += 1
        at.radius_A[stuck_A], at.flip_A[stuck_A], at.since_A[stuck_A] = torch.inf, 0, 0
        for start in sorted(set(at.start_A[stuck_A].tolist())):
            generator = torch.Generator().manual_seed((_STARTS * self._seed + start) % 2**63)
            signs_D = 2 * torch.randint(2, at.signs_AD.shape[1:], generator=generator) - 1
            at.signs_AD[stuck_A[at.start_A[stuck_A] == start]] = signs_D.to(at.signs_AD)

    def _signs(self) -> Tensor:
        """Return the direction under trial of each image: the best one, with a block flipped."""
        at = self._at
        value_D = torch.arange(at.signs_AD.shape[1], device=at.signs_AD.device)
        begin_A, end_A = self._begin_B[at.flip_A], self._end_B[at.flip_A]
        flipped_AD = (value_D >= begin_A[:, None]) & (value_D < end_A[:, None])
        return torch.where(flipped_AD, -at.signs_AD, at.signs_AD)

    def _radius(self) -> Tensor:
        """Return the radius at which each image is asked about.

        A new direction has to be better than the best one at once. Its radius is then halved, but
        what is within epsilon already need not be known any better.
        """
        at = self._at
        better_A = (at.radius_A - self._least).clamp(max=_FARTHEST)
        return torch.where(at.halving_A, (at.low_A + at.high_A) / 2, better_A).clamp(
            min=self._epsilon
        )


def _blocks(values: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of an empty block, then of all of 2^s equal ones, until of one value."""
    yield 0, 0
    size, count = values, 1
    while True:
        yield from ((i, min(i + size, values)) for i in range(0, values, size))
        if size == 1:
            return
        count *= 2
        size = -(-values // count)

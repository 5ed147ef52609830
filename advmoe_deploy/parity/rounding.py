"""Rounding of a network to float32: the difference it may make on any processor.

How exact a float32 sum is depends on the order of its additions, and that on the processor, the
runtime and the number of threads: what torch loses here says little about another's loss. So the
weights of the same network in float64 are disturbed as much as the sums that they take part in are
likely to be rounded. All images are moved the same way by that, so that one draw of directions
says little, where there are few outputs: it was a tenth of others on a router's two scores.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

# Half a unit in the last place of a float32 of 1: one rounding.
_ROUNDING = 2.0**-24
# How many partial sums a vectorised loop keeps at least: each adds up a share of the products.
_PARTIAL_SUMS = 16
# Draws of directions that are tried; the furthest counts.
DRAWS = range(3)
# As many random directions are drawn, and then repeated: a prime, which no channel is as long as.
_DIRECTIONS = 65_521


def furthest(answers: Sequence[Tensor], exact: Tensor) -> Tensor:
    """Return, value by value, those of ``answers`` that are furthest from ``exact``."""
    stacked = torch.stack(list(answers))
    rows = (stacked - exact).abs().argmax(dim=0, keepdim=True)
    return stacked.gather(0, rows)[0]


def disturbed(weight: Tensor, draw: int) -> Tensor:
    """Return ``weight`` in float64, every value moved by the rounding of the sum it belongs to.

    A sum of K products is rounded K / 16 times one after the other, in random directions: by about
    the square root of that. The directions of a ``draw`` are the same every time.
    """
    products = weight[0].numel() if weight.dim() > 1 else 1
    size = _ROUNDING * max(1.0, products / _PARTIAL_SUMS) ** 0.5
    factors = _directions(draw).mul(size).add(1).repeat(-(-weight.numel() // _DIRECTIONS))
    return weight.double() * factors[: weight.numel()].view(weight.shape)


def disturb(parameters: Iterable[Tensor], draw: int) -> None:
    """Disturb float64 ``parameters`` in place."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(disturbed(parameter, draw))


@cache
def _directions(draw: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw)
    return torch.randn(_DIRECTIONS, generator=generator, dtype=torch.float64)

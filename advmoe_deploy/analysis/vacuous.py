"""Certified radii that are true and say nothing: no other image of 8 bits lies within them."""

from torch import Tensor

LEVEL = 1 / 255  # the least distance, l-inf or l2, of two different images of 8 bits
VACUOUS = "vacuous: all are below 1/255, and no other image of 8 bits is that near"


def is_vacuous(radius_N: Tensor) -> bool:
    """Return whether no radius [N], in [0, 1] pixels, reaches another image of 8 bits."""
    return bool((radius_N < LEVEL).all())

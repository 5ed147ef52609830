"""Recipes behind the name of a family alone, for images of one's own: for few, and for many."""

from collections.abc import Callable

from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.recipes import cifar10_cpu, digits

Make = Callable[[], TrainConfig]

# From so many training images on, the second.
MANY = 5000
FAMILIES: dict[str, tuple[Make, Make]] = {
    "advmoe": (digits.digits_advmoe_agreeing, cifar10_cpu.cifar10_advmoe),
    "at-moe": (digits.digits_at_moe, cifar10_cpu.cifar10_at_moe),
    "dense": (digits.digits_dense, cifar10_cpu.cifar10_dense),
    "s-dense": (digits.digits_s_dense, cifar10_cpu.cifar10_s_dense),
}


def family_recipe(family: str, images: int) -> TrainConfig:
    """Return what trains ``family`` on so many ``images``."""
    few, many = FAMILIES[family]
    return many() if images >= MANY else few()

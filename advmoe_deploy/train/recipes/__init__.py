"""Recipes: each a function that returns one typed configuration, and says what it reaches."""

from collections.abc import Callable

from advmoe_deploy.errors import unknown_name
from advmoe_deploy.train.config import TrainConfig, apply_overrides
from advmoe_deploy.train.recipes import cifar10, digits

__all__ = ["RECIPES", "apply_overrides", "recipe"]

Recipe = Callable[[], TrainConfig]

# A recipe is called what its configuration says.
RECIPES: dict[str, Recipe] = {make().name: make for make in (*digits.RECIPES, *cifar10.RECIPES)}


def recipe(name: str) -> TrainConfig:
    """Return the recipe of this name; an unknown one is a UsageError that offers the nearest."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[name]()

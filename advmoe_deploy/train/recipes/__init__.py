"""Recipes: functions that return one typed configuration, with what it reaches."""

from advmoe_deploy.errors import unknown_name
from advmoe_deploy.train.config import TrainConfig, apply_overrides
from advmoe_deploy.train.recipes import (
    advmoe_tables,
    cifar10_cpu,
    digits,
    digits_systems,
    experts_tables,
    networks_tables,
)
from advmoe_deploy.train.recipes.base import Recipe

__all__ = ["RECIPES", "Recipe", "apply_overrides", "recipe"]

RECIPES: dict[str, Recipe] = {
    **digits.RECIPES,
    **digits_systems.RECIPES,
    **cifar10_cpu.RECIPES,
    **advmoe_tables.RECIPES,
    **experts_tables.RECIPES,
    **networks_tables.RECIPES,
}


def recipe(name: str) -> TrainConfig:
    """Return the recipe of this name; an unknown one is a UsageError that offers the nearest."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES, listed_by="advmoe list recipes")
    return RECIPES[name].make()

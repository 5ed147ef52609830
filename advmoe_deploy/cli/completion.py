"""What the shell offers when Tab is pressed. Nothing here may load torch, or take long."""

from collections.abc import Iterable

# A completion, and what it is.
Offers = list[tuple[str, str]]

KINDS = ("recipes", "families", "models", "engines", "data")


def recipes(incomplete: str) -> Offers:
    """Return the recipes, and the families for a folder of one's own."""
    from advmoe_deploy.train.recipes import RECIPES
    from advmoe_deploy.train.recipes.by_family import FAMILIES

    own = [(family, "for a folder of your own") for family in FAMILIES]
    return _fitting([*own, *((name, each.summary) for name, each in RECIPES.items())], incomplete)


def engines(incomplete: str) -> Offers:
    """Return the engines, without precisions."""
    from advmoe_deploy.runtime.select import ENGINES

    return _fitting(((name, "") for name in ENGINES), incomplete)


def data_sets(incomplete: str) -> Offers:
    """Return the data sets with a name; where none fits, the shell offers folders."""
    from advmoe_deploy.data.registry import DATASETS

    return _fitting(((name, "") for name in DATASETS), incomplete)


def families(incomplete: str) -> Offers:
    """Return the families of networks."""
    from typing import get_args

    from advmoe_deploy.families import Family

    return _fitting(((name, "") for name in get_args(Family)), incomplete)


def named_models(incomplete: str) -> list[str]:
    """Return the models with a name, once a letter says that no file is meant.

    The shell offers files where nothing is returned.
    """
    from advmoe_deploy.zoo.places import models

    names = dict.fromkeys(f"zoo:{name}" for name, _, _ in models())
    return [name for name in names if incomplete and name.startswith(incomplete)]


def kinds(incomplete: str) -> Offers:
    """Return what ``advmoe list`` lists."""
    return _fitting(((kind, "") for kind in KINDS), incomplete)


def _fitting(offers: Iterable[tuple[str, str]], incomplete: str) -> Offers:
    return [(name, what) for name, what in offers if name.startswith(incomplete)]

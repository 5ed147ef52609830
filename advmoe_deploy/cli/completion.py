"""Completion for the shell's Tab. Nothing here may load torch, or take long."""

import os
from collections.abc import Iterable

# A completion, and what it is.
Offers = list[tuple[str, str]]

KINDS = ("recipes", "families", "models", "engines", "data")

_before = ""  # what bash holds for words before the one that it asks for, though it is one word


def join_words() -> None:
    """Undo what bash does to a word with a colon in it: it makes three of one.

    It does so where ``COMP_WORDBREAKS`` has the colon, as from the start; then it asks for what is
    behind the colon alone, and replaces that.
    """
    global _before
    if os.environ.get("_ADVMOE_COMPLETE") != "complete_bash":
        return
    words: list[str] = []
    split = os.environ["COMP_WORDS"].split("\n")
    for word in split[: int(os.environ["COMP_CWORD"]) + 1]:
        goes_on = word == ":" or (word and words and words[-1].endswith(":"))
        words = [*words[:-1], words[-1] + word] if goes_on and words else [*words, word]
    if ":" in split:
        before, colon, words[-1] = words[-1].rpartition(":")
        _before = before + colon
    os.environ["COMP_WORDS"] = "\n".join(words)
    os.environ["COMP_CWORD"] = str(len(words) - 1)


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


def named_models(incomplete: str) -> Offers:
    """Return the models with a name, once a letter says that no file is meant.

    The shell offers files where nothing is returned.
    """
    from advmoe_deploy.zoo.places import models

    names = dict.fromkeys(f"zoo:{name}" for name, _, _ in models())
    return _fitting(((name, "") for name in names), incomplete) if _before + incomplete else []


def kinds(incomplete: str) -> Offers:
    """Return what ``advmoe list`` lists."""
    return _fitting(((kind, "") for kind in KINDS), incomplete)


def _fitting(offers: Iterable[tuple[str, str]], incomplete: str) -> Offers:
    begun = _before + incomplete
    return [(name.removeprefix(_before), what) for name, what in offers if name.startswith(begun)]

"""The command ``show``: every setting of a recipe, with its meaning."""

from typing import Annotated

import typer

from advmoe_deploy.cli.completion import recipes
from advmoe_deploy.cli.options import Json
from advmoe_deploy.cli.session import session


def show(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            autocompletion=recipes,
            help="'advmoe list recipes' names them; or a family: advmoe, at-moe, dense, s-dense.",
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="With this field changed; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show each setting of a recipe: value, default, meaning."""
    with session(as_json) as ui:
        from advmoe_deploy.cli.tables import settings as tables
        from advmoe_deploy.train.config import apply_overrides
        from advmoe_deploy.train.meaning import settings_of
        from advmoe_deploy.train.recipes import RECIPES
        from advmoe_deploy.train.request import recipe_or_family

        config = apply_overrides(recipe_or_family(recipe), settings or ())
        about = RECIPES[recipe_or_family(recipe).name]
        summary = f"{about.summary}; {about.figures}"
        value = {
            "recipe": config.name,
            "summary": summary,
            "settings": [vars(setting) for setting in settings_of(config)],
        }
        ui.show(value, lambda: tables.recipe_settings(summary, config))

"""Recipes, overrides, and combinations that make no sense."""

import pytest

from advmoe_deploy.errors import UsageError
from advmoe_deploy.train.recipes import apply_overrides, recipe


def test_an_unknown_recipe_offers_the_nearest() -> None:
    with pytest.raises(UsageError, match="digits-advmoe"):
        recipe("digit-advmo")


def test_overrides_reach_nested_values() -> None:
    config = apply_overrides(
        recipe("digits-advmoe"), ["epochs=3", "model.num_experts=4", "ema_decay=null"]
    )
    assert (config.epochs, config.model.num_experts, config.ema_decay) == (3, 4, None)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("epoch=3", "did you mean epochs"),
        ("model.num_expert=3", "did you mean model.num_experts"),
        ("epochs", "key=value"),
        ("epochs=zero", "epochs"),
        ("router_lr=0.1", "router_lr"),
        ("model.top_k=3", "top_k=3 exceeds num_experts=2"),
        ("method=sparse", "trains family dense"),
        ("model=3", "did you mean"),
    ],
)
def test_bad_settings_are_one_line(setting: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        apply_overrides(recipe("digits-advmoe"), [setting])
    assert "\n" not in str(caught.value)

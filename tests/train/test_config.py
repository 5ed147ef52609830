"""Recipes, overrides, and combinations that make no sense."""

import pytest

from advmoe_deploy.errors import UsageError
from advmoe_deploy.families import Family
from advmoe_deploy.train.recipes import apply_overrides, recipe
from tests.toy_training import tiny_of


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


@pytest.mark.parametrize(
    ("family", "method", "settings", "says"),
    [
        ("dense", "joint", ["method=advmoe"], "method advmoe trains family advmoe, not dense"),
        ("advmoe", "joint", ["method=rt-er", "loss=pgd-at"], "trains family expert-networks"),
        ("advmoe", "joint", ["method=jtdmoe", "loss=pgd-at"], "trains family dual-model"),
        ("robust-experts", "joint", ["method=advmoe-released"], "trains family advmoe"),
        ("expert-networks", "rt-er", ["loss=trades"], "rt-er is defined with loss pgd-at"),
        ("advmoe", "joint", ["loss=trade"], "loss: .*'trades'"),
        ("dense", "joint", ["balance_loss=switch"], "balance_loss needs routes"),
        ("dense", "joint", ["gate_noise=0.1"], "gate_noise needs routes"),
        ("dense", "joint", ["capacity_factor=1"], "capacity_factor needs routes"),
        ("dense", "joint", ["track_router_robustness=true"], "needs routes"),
        ("vit-moe", "joint", ["class_routing_weight=1"], "for family advmoe"),
        ("advmoe", "experts-only", ["balance_loss=switch"], "needs a router that learns"),
        ("advmoe", "advmoe-released", ["class_routing_weight=1"], "no part of method"),
        ("robust-experts", "joint", ["capacity_factor=0.5"], "without an expert; use at least 1"),
        ("dense", "joint", ["threat.epsilon=1.5"], "threat.epsilon: .*less than or equal to 1"),
        ("dense", "joint", ["threat.epsilon=0"], "threat.epsilon: .*greater than 0"),
        ("dense", "joint", ["batch_size=8", "accumulate=5"], "lower accumulate"),
        ("dense", "sparse", ["epochs=2"], "at least 3 epochs"),
        ("dense", "sparse", ["sparse_ratio=1"], "nothing to prune"),
        ("dense", "joint", ["sparse_density=0.1"], "goes with method sparse"),
        ("advmoe", "joint", ["model.transformer.depth=3"], "did you mean|unknown setting"),
        (
            "vit-moe",
            "joint",
            ["model.transformer=null", "model.transformer.depth=3"],
            "set it whole",
        ),
    ],
)
def test_what_makes_no_sense_together_is_refused_in_one_line(
    family: Family, method: str, settings: list[str], says: str
) -> None:
    epochs = ["epochs=3"] if method == "sparse" else []
    with pytest.raises(UsageError, match=says) as caught:
        apply_overrides(tiny_of(family, method, *epochs), settings)
    assert "\n" not in str(caught.value)


def test_a_fixed_gate_is_not_for_router_only() -> None:
    config = tiny_of("robust-experts", "joint")
    with pytest.raises(UsageError, match="gate fixed-gap-fc, which never learns"):
        gate = '{"kind": "conv", "layers": ["layer4.1"], "gate": "fixed-gap-fc"}'
        apply_overrides(config, [f"model.expert_layers={gate}", "method=router-only"])


def test_another_backbone_brings_its_own_width() -> None:
    base = recipe("cifar10-resnet18-advmoe")
    assert apply_overrides(base, ["model.backbone=wrn-28-10"]).model.width == 160
    both = apply_overrides(base, ["model.backbone=wrn-28-10", "model.width=32"])
    assert both.model.width == 32
    same = apply_overrides(recipe("digits-advmoe"), ["model.backbone=resnet18"])
    assert same.model.width == recipe("digits-advmoe").model.width

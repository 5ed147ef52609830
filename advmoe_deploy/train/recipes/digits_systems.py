"""The other systems of the papers on the embedded digits, each a small edit of the first recipe.

They are there to see every system work in a minute of one CPU core; which is best on images this
easy says little.
"""

from collections.abc import Callable

from advmoe_deploy.specs import ExpertLayers, ModelSpec, VisionTransformer
from advmoe_deploy.train.config import TrainConfig, without_router
from advmoe_deploy.train.recipes.base import Recipe, variant
from advmoe_deploy.train.recipes.digits import DIGITS_EPSILON, digits_advmoe, digits_dense
from advmoe_deploy.train.recipes.dissection import (
    on_clean_images,
    only_experts,
    only_router,
)


def released() -> TrainConfig:
    """Return AdvMoE with the losses of its released code: the router learns label modulo E."""
    return variant(
        digits_advmoe(),
        name="digits-advmoe-released",
        method="advmoe-released",
        balanced_start=False,
        class_routing_weight=0.0,
    )


def router_only() -> TrainConfig:
    """Return the ablation that trains the router and leaves the experts as they started."""
    return only_router(digits_advmoe(), name="digits-router-only")


def experts_only() -> TrainConfig:
    """Return the ablation that trains the experts and leaves the router as it started."""
    return only_experts(digits_advmoe(), name="digits-experts-only")


def moe_standard() -> TrainConfig:
    """Return AdvMoE's network trained on clean images: where its dissection begins."""
    return on_clean_images(digits_advmoe(), name="digits-moe-standard")


def sparse() -> TrainConfig:
    """Return the dense network pruned to the MACs of S-Dense by learned importance."""
    return variant(digits_dense(), name="digits-sparse", method="sparse")


def block_moe() -> TrainConfig:
    """Return Robust Experts with four residual blocks to choose from in the last stage."""
    return _expert_layers("digits-block-moe", ExpertLayers(kind="block", layers=("layer4",)))


def conv_moe() -> TrainConfig:
    """Return Robust Experts with four convolutions to choose from in each of the last stage."""
    return _expert_layers("digits-conv-moe", ExpertLayers(kind="conv", layers=("layer4",)))


def rt_er() -> TrainConfig:
    """Return RT-ER: four whole networks behind a linear router."""
    return _networks("digits-rt-er", "rt-er", _model(family="expert-networks", num_experts=4))


def jtdmoe() -> TrainConfig:
    """Return JTDMoE: a standard and a robust mixture of two networks each, alpha 0.7."""
    model = _model(family="dual-model", num_experts=2, alpha=0.7)
    return _networks("digits-jtdmoe", "jtdmoe", model)


def vit_moe() -> TrainConfig:
    """Return V-MoE: a ViT of four blocks, two of them with four experts a token can go to.

    On digits a ViT stays at chance for long unless pixels are normalised, steps are many, and some
    of the loss is of clean images.
    """
    model = _model(
        family="vit-moe",
        backbone="vit",
        num_experts=4,
        weighting="probability",
        width=48,
        mean=(0.3,),
        std=(0.38,),
        transformer=VisionTransformer(patch_size=2, depth=4, heads=3, moe_blocks=(1, 3)),
    )
    base = _pgd_at("digits-vit-moe", model)
    return variant(
        base,
        name=base.name,
        loss="trades",
        beta=3.0,
        attack_steps=2,
        attack_step_size=None,
        epochs=20,
        batch_size=16,
        weight_decay=5e-4,
        balance_loss="importance-load",
        balance_weight=0.01,
    )


def vit() -> TrainConfig:
    """Return the ViT of the same width without experts: the dense twin of digits-vit-moe."""
    base = vit_moe()
    return without_router(base, name="digits-vit", model=base.model.dense())


def _expert_layers(name: str, layers: ExpertLayers) -> TrainConfig:
    model = _model(
        family="robust-experts",
        num_experts=4,
        weighting="renormalised",
        width=16,
        expert_layers=layers,
    )
    return variant(_pgd_at(name, model), name=name, balance_loss="switch", gate_noise=0.1)


def _networks(name: str, method: str, model: ModelSpec) -> TrainConfig:
    return variant(_pgd_at(name, model), name=name, method=method, beta=6.0)


def _pgd_at(name: str, model: ModelSpec) -> TrainConfig:
    return variant(
        digits_dense(),
        name=name,
        model=model,
        loss="pgd-at",
        attack_steps=5,
        attack_step_size=DIGITS_EPSILON / 2,
        attack_noise=DIGITS_EPSILON / 2,
        epochs=12,
    )


def _model(**fields: object) -> ModelSpec:
    digits = {"in_channels": 1, "image_size": 8, "mean": (0.0,), "std": (1.0,), "width": 16}
    return ModelSpec.model_validate({**digits, **fields})


def _summary(make: Callable[[], TrainConfig]) -> str:
    return (make.__doc__ or "").splitlines()[0].removeprefix("Return ").rstrip(".")


RECIPES = {
    make().name: Recipe(make=make, summary=_summary(make))
    for make in (
        released,
        moe_standard,
        router_only,
        experts_only,
        sparse,
        block_moe,
        conv_moe,
        rt_er,
        jtdmoe,
        vit_moe,
        vit,
    )
}

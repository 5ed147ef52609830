"""Mixtures of whole networks (RT-ER, JTDMoE; arXiv 2502.06832) and small ViTs with experts (V-MoE).

RT-ER and JTDMoE are attacked as the paper says: PGD-10 with steps of 2/255 in training, PGD-50 in
evaluation, epsilon 8/255 (2/255 for its ViTs, whose steps of 0.5/255 are ours: one of 2/255 would
cross the ball). Epochs and learning rates are ours, for its text leaves them open; so is all of the
training of the small ViTs.
"""

from advmoe_deploy.specs import ModelSpec, ThreatModel, VisionTransformer
from advmoe_deploy.train.config import TrainConfig, without_router
from advmoe_deploy.train.recipes.base import Recipe, variant
from advmoe_deploy.train.recipes.images import IMAGE_SETS
from advmoe_deploy.train.recipes.published import dual_cell

_CIFAR10, _TINY = IMAGE_SETS["cifar10"], IMAGE_SETS["tiny-imagenet"]
_VIT_S = VisionTransformer(patch_size=8, depth=12, heads=6)


def rt_er() -> TrainConfig:
    """Return four ResNet-18 behind a linear router, trained by RT-ER on CIFAR-10."""
    return TrainConfig(
        name="cifar10-rt-er",
        data=_CIFAR10.name,
        model=ModelSpec(family="expert-networks", num_experts=4, **_CIFAR10.fields),
        threat=ThreatModel(epsilon=8 / 255),
        method="rt-er",
        loss="pgd-at",
        beta=6,
        attack_steps=10,
        attack_step_size=2 / 255,
        attack_noise=4 / 255,
        test_attack_step_size=2 / 255,
        crop_padding=_CIFAR10.crop_padding,
        flip=True,
    )


def jtdmoe() -> TrainConfig:
    """Return a standard and a robust mixture, blended with alpha 0.7, trained jointly."""
    base = rt_er()
    model = ModelSpec(family="dual-model", num_experts=4, alpha=0.7, **_CIFAR10.fields)
    return variant(base, name="cifar10-jtdmoe", method="jtdmoe", model=model)


def rt_er_vit() -> TrainConfig:
    """Return four ViT-S behind a linear router on Tiny-ImageNet."""
    model = ModelSpec(
        family="expert-networks",
        backbone="vit",
        num_experts=4,
        width=384,
        transformer=_VIT_S,
        **_TINY.fields,
    )
    return variant(
        rt_er(),
        name="tiny-imagenet-rt-er-vit",
        data=_TINY.name,
        model=model,
        threat=ThreatModel(epsilon=2 / 255),
        attack_step_size=0.5 / 255,
        attack_noise=1 / 255,
        test_attack_step_size=0.5 / 255,
        lr=0.01,
    )


def vit_moe() -> TrainConfig:
    """Return a small ViT with eight experts in place of the MLPs of two blocks."""
    model = ModelSpec(
        family="vit-moe",
        backbone="vit",
        num_experts=8,
        weighting="probability",
        width=192,
        transformer=VisionTransformer(patch_size=4, depth=6, heads=3, moe_blocks=(3, 5)),
        **_CIFAR10.fields,
    )
    return TrainConfig(
        name="cifar10-vit-moe",
        data=_CIFAR10.name,
        model=model,
        threat=ThreatModel(epsilon=8 / 255),
        method="joint",
        loss="pgd-at",
        attack_steps=7,
        attack_step_size=2 / 255,
        balance_loss="importance-load",
        balance_weight=0.01,
        gate_noise=1 / 8,
        lr=0.02,
        schedule="one-cycle",
        crop_padding=_CIFAR10.crop_padding,
        flip=True,
    )


def vit() -> TrainConfig:
    """Return the dense twin of :func:`vit_moe`: the same width, one expert's MLP."""
    base = vit_moe()
    return without_router(base, name="cifar10-vit", model=base.model.dense())


RECIPES = {
    "cifar10-rt-er": Recipe(
        make=rt_er,
        summary="RT-ER: four ResNet-18 behind a linear router, CIFAR-10",
        published=dual_cell(77.8, 69.1),
    ),
    "cifar10-jtdmoe": Recipe(
        make=jtdmoe, summary="JTDMoE: a standard and a robust mixture, alpha 0.7, CIFAR-10"
    ),
    "tiny-imagenet-rt-er-vit": Recipe(
        make=rt_er_vit, summary="RT-ER: four ViT-S behind a linear router, Tiny-ImageNet"
    ),
    "cifar10-vit-moe": Recipe(
        make=vit_moe, summary="V-MoE: a small ViT with eight experts in two blocks, CIFAR-10"
    ),
    "cifar10-vit": Recipe(make=vit, summary="the dense twin of cifar10-vit-moe"),
}

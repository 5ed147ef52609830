"""Recipes that train a real model on a CPU in hours: CIFAR-10, ResNet-18, one schedule for all.

Examples come from one step (N-FGSM), learning rates from one cycle. In bfloat16, which a CPU with
AVX-512 BF16 or AMX runs at twice the speed and more.
"""

from advmoe_deploy.specs import ModelSpec, ThreatModel
from advmoe_deploy.train.config import TrainConfig, without_router
from advmoe_deploy.train.recipes.base import Recipe, variant
from advmoe_deploy.train.recipes.images import IMAGE_SETS

_CIFAR10 = IMAGE_SETS["cifar10"]


def cifar10_advmoe() -> TrainConfig:
    """Return AdvMoE of the paper's size, whose experts agree as in ``digits-advmoe-agreeing``.

    The first 13 epochs train one pathway, the last two train two of them behind the router.
    """
    return TrainConfig(
        name="cifar10-advmoe-cpu",
        data="cifar10",
        model=ModelSpec(
            family="advmoe", backbone="resnet18", num_experts=2, ratio=0.5, **_CIFAR10.fields
        ),
        threat=ThreatModel(epsilon=8 / 255),
        method="advmoe",
        loss="n-fgsm",
        epochs=15,
        shared_start=0.87,
        test_images=500,
        lr=0.2,
        router_lr=0.01,
        schedule="one-cycle",
        router_every=4,
        random_routes=1,
        route_stability=6,
        balanced_start=True,
        even_loads=True,
        balance_loss="column-entropy",
        balance_weight=20,
        crop_padding=_CIFAR10.crop_padding,
        flip=True,
        precision="bf16-mixed",
        evaluate_every=3,
    )


def cifar10_at_moe() -> TrainConfig:
    """Return AT MoE: router and experts in one joint step, all else as in AdvMoE's recipe.

    Unlike the papers' it keeps the shared start and what holds routes even and still.
    """
    alone = {"random_routes": 0, "router_every": 1}
    return variant(cifar10_advmoe(), name="cifar10-at-moe-cpu", method="joint", **alone)


def cifar10_dense() -> TrainConfig:
    """Return the dense network of full width."""
    base = cifar10_advmoe()
    return without_router(base, name="cifar10-dense-cpu", model=base.model.dense())


def cifar10_s_dense() -> TrainConfig:
    """Return the dense network of half width."""
    base = cifar10_advmoe()
    return without_router(base, name="cifar10-s-dense-cpu", model=base.model.s_dense())


RECIPES = {
    "cifar10-advmoe-cpu": Recipe(
        make=cifar10_advmoe,
        summary="AdvMoE, two experts of half width, in hours on a CPU",
        measured="clean 72.4 %, PGD-50 44.5 %, AutoAttack 40.1 %, routes too 38.5 % (one seed)",
    ),
    "cifar10-at-moe-cpu": Recipe(
        make=cifar10_at_moe,
        summary="AT MoE: as cifar10-advmoe-cpu, but in one joint step",
    ),
    "cifar10-dense-cpu": Recipe(
        make=cifar10_dense,
        summary="AT dense: full width, no experts, in hours on a CPU",
        measured="clean 76.5 %, PGD-50 45.6 % (one seed)",
    ),
    "cifar10-s-dense-cpu": Recipe(
        make=cifar10_s_dense,
        summary="AT S-Dense: half width, no experts, in hours on a CPU",
        measured="clean 73.0 %, PGD-50 45.7 %, AutoAttack 40.9 % (one seed)",
    ),
}

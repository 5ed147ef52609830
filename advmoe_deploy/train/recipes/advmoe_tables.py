"""AdvMoE's tables: a recipe for every data set, backbone and column.

Hyper-parameters are the paper's: 100 epochs, batch 128, SGD with momentum 0.9 and weight decay
5e-4, cosine from 0.1, TRADES with beta 6 on two steps of 5/255 at epsilon 8/255. Where ours differ:
the router's learning rate is 0.002 and its gradient is clipped; its start is balanced, it also
learns to keep classes together and is paid for even loads, without which all images go to one
expert (measured over the first 100 steps in benchmarks/results/first_steps.json, whose row "paper"
is what happens without); the epoch is chosen on a hold-out. ``-paper`` recipes do without, but for
the router's learning rate, 0.01 at most, and the clipping: at 0.1 its scores explode. PGD-50 takes
the paper's steps of 2/255.
"""

from functools import partial

from advmoe_deploy.families import Backbone
from advmoe_deploy.specs import ModelSpec, ThreatModel
from advmoe_deploy.train.config import TrainConfig, without_router
from advmoe_deploy.train.recipes.base import Recipe, paper_objective, variant
from advmoe_deploy.train.recipes.dissection import (
    on_clean_images,
    only_experts,
    only_router,
)
from advmoe_deploy.train.recipes.images import IMAGE_SETS, ImageSet
from advmoe_deploy.train.recipes.published import advmoe_cells

EPSILON = 8 / 255

_SUMMARIES = {
    "advmoe": "AdvMoE, two experts of half width",
    "paper": "AdvMoE by its paper's objective alone",
    "at-moe": "AT MoE: router and experts in one joint step",
    "dense": "AT dense: full width, no experts",
    "s-dense": "AT S-Dense: half width, no experts",
    "sparse": "AT sparse: pruned to S-Dense's MACs by learned importance",
}


# At 224 pixels the paper's router would cost 1.99 G MACs, more than the dense ResNet-18; of a
# quarter of the width it costs 0.13 G, in proportion to what it chooses about as on CIFAR-10.
_ROUTERS = {"imagenet": {"router_width": 4}}


def advmoe(images: ImageSet, backbone: Backbone) -> TrainConfig:
    """Return AdvMoE with the paper's hyper-parameters."""
    model = ModelSpec(
        family="advmoe",
        backbone=backbone,
        num_experts=2,
        ratio=0.5,
        **images.fields,
        **_ROUTERS.get(images.name, {}),
    )
    return TrainConfig(
        name=f"{images.name}-{backbone}-advmoe",
        data=images.name,
        model=model,
        threat=ThreatModel(epsilon=EPSILON),
        method="advmoe",
        router_lr=0.002,
        balanced_start=True,
        class_routing_weight=20,
        balance_loss="column-entropy",
        balance_weight=20,
        attack_step_size=5 / 255,
        test_attack_step_size=2 / 255,
        crop_padding=images.crop_padding,
        flip=True,
    )


def paper(images: ImageSet, backbone: Backbone) -> TrainConfig:
    """Return AdvMoE by its paper's objective alone: no remedy against a router that collapses."""
    return paper_objective(advmoe(images, backbone), name=f"{images.name}-{backbone}-advmoe-paper")


def at_moe(images: ImageSet, backbone: Backbone) -> TrainConfig:
    """Return the baseline that trains router and experts jointly."""
    name = f"{images.name}-{backbone}-at-moe"
    return variant(advmoe(images, backbone), name=name, method="joint")


def moe_standard(images: ImageSet, backbone: Backbone) -> TrainConfig:
    """Return AdvMoE's network trained on clean images: where its dissection begins."""
    name = f"{images.name}-{backbone}-moe-standard"
    return on_clean_images(advmoe(images, backbone), name=name)


def router_only(images: ImageSet, backbone: Backbone) -> TrainConfig:
    """Return the ablation that trains the router alone."""
    name = f"{images.name}-{backbone}-router-only"
    return only_router(advmoe(images, backbone), name=name)


def experts_only(images: ImageSet, backbone: Backbone) -> TrainConfig:
    """Return the ablation that trains the experts alone."""
    name = f"{images.name}-{backbone}-experts-only"
    return only_experts(advmoe(images, backbone), name=name)


def at_dense(images: ImageSet, backbone: Backbone) -> TrainConfig:
    """Return the dense baseline of full width."""
    base = advmoe(images, backbone)
    name = f"{images.name}-{backbone}-dense"
    return without_router(base, name=name, model=base.model.dense())


def at_s_dense(images: ImageSet, backbone: Backbone) -> TrainConfig:
    """Return the dense baseline of half width."""
    base = advmoe(images, backbone)
    name = f"{images.name}-{backbone}-s-dense"
    return without_router(base, name=name, model=base.model.s_dense())


def at_sparse(images: ImageSet, backbone: Backbone) -> TrainConfig:
    """Return the baseline that is pruned to the MACs of S-Dense."""
    name = f"{images.name}-{backbone}-sparse"
    return variant(at_dense(images, backbone), name=name, method="sparse")


_COLUMNS = {
    "dense": at_dense,
    "s-dense": at_s_dense,
    "sparse": at_sparse,
    "at-moe": at_moe,
    "advmoe": advmoe,
}

_DISSECTION = {
    "moe-standard": (moe_standard, "AdvMoE's network on clean images"),
    "router-only": (router_only, "the router alone, for --from a trained run"),
    "experts-only": (experts_only, "the experts alone, for --from a trained run"),
}

RECIPES = (
    {
        f"{data}-{backbone}-{column}": Recipe(
            make=partial(_COLUMNS[column], IMAGE_SETS[data], backbone),
            summary=f"{_SUMMARIES[column]}, {backbone} on {data}",
            published=cell,
        )
        for (data, backbone, column), cell in advmoe_cells().items()
    }
    | {
        f"{data}-{backbone}-advmoe-paper": Recipe(
            make=partial(paper, IMAGE_SETS[data], backbone),
            summary=f"{_SUMMARIES['paper']}, {backbone} on {data}",
            published=cell,
        )
        for (data, backbone, column), cell in advmoe_cells().items()
        if column == "advmoe"
    }
    | {
        f"cifar10-resnet18-{part}": Recipe(
            make=partial(make, IMAGE_SETS["cifar10"], "resnet18"),
            summary=f"{summary}, resnet18 on cifar10",
        )
        for part, (make, summary) in _DISSECTION.items()
    }
)

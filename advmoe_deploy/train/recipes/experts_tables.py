"""Robust Experts (arXiv 2509.05086): ResNets with layers of experts on CIFAR-100.

PGD-7 training at 8/255 with steps of 2/255, as the paper says; epochs and learning rate are ours,
for the paper's text leaves them open.
"""

from collections.abc import Callable
from functools import partial

from advmoe_deploy.families import Backbone
from advmoe_deploy.specs import ExpertLayers, ModelSpec, ThreatModel
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.recipes.base import Recipe, variant
from advmoe_deploy.train.recipes.images import IMAGE_SETS
from advmoe_deploy.train.recipes.published import Published, experts_cell

_IMAGES = IMAGE_SETS["cifar100"]


def baseline(backbone: Backbone = "resnet18") -> TrainConfig:
    """Return the dense ResNet of the paper, PGD-trained."""
    return TrainConfig(
        name=f"cifar100-{backbone}-pgd-at",
        data=_IMAGES.name,
        model=ModelSpec(family="dense", backbone=backbone, **_IMAGES.fields),
        threat=ThreatModel(epsilon=8 / 255),
        method="joint",
        loss="pgd-at",
        attack_steps=7,
        attack_step_size=2 / 255,
        test_attack_steps=20,
        test_attack_step_size=2 / 255,
        crop_padding=_IMAGES.crop_padding,
        flip=True,
    )


def expert_layers(
    name: str,
    layers: ExpertLayers,
    balance: str,
    *,
    top_k: int = 1,
    backbone: Backbone = "resnet18",
) -> TrainConfig:
    """Return four experts at ``layers``, trained with noise 0.1 and a balancing loss of 0.5."""
    model = ModelSpec(
        family="robust-experts",
        backbone=backbone,
        num_experts=4,
        top_k=top_k,
        weighting="renormalised",
        expert_layers=layers,
        **_IMAGES.fields,
    )
    return variant(baseline(backbone), name=name, model=model, balance_loss=balance, gate_noise=0.1)


def block_moe(
    name: str, *layers: str, balance: str, backbone: Backbone = "resnet18"
) -> TrainConfig:
    """Return whole residual blocks as experts."""
    where = ExpertLayers(kind="block", layers=layers)
    return expert_layers(name, where, balance, backbone=backbone)


def conv_moe(
    name: str, *layers: str, balance: str, top_k: int = 1, backbone: Backbone = "resnet18"
) -> TrainConfig:
    """Return single convolutions as experts."""
    where = ExpertLayers(kind="conv", layers=layers)
    return expert_layers(name, where, balance, top_k=top_k, backbone=backbone)


_Cell = tuple[str, Callable[[str], TrainConfig], Published | None]
_CELLS: dict[str, _Cell] = {
    "cifar100-resnet18-pgd-at": (
        "ResNet-18 without experts",
        lambda _: baseline(),
        experts_cell(52.1, 16.9),
    ),
    "cifar100-resnet50-pgd-at": (
        "ResNet-50 without experts",
        lambda _: baseline("resnet50"),
        experts_cell(53.3, 17.2),
    ),
    "cifar100-block-moe-layer4-switch": (
        "BlockMoE, both blocks of conv5, switch loss",
        lambda name: block_moe(name, "layer4", balance="switch"),
        experts_cell(51.4, 22.7),
    ),
    "cifar100-block-moe-layer4.1-entropy": (
        "BlockMoE, second block of conv5, entropy loss",
        lambda name: block_moe(name, "layer4.1", balance="entropy"),
        experts_cell(54.9, 20.0),
    ),
    "cifar100-block-moe-layer3-switch": (
        "BlockMoE, both blocks of conv4, which gained the paper nothing",
        lambda name: block_moe(name, "layer3", balance="switch"),
        None,
    ),
    "cifar100-conv-moe-layer4-entropy": (
        "ConvMoE, all convolutions of conv5, entropy loss",
        lambda name: conv_moe(name, "layer4", balance="entropy"),
        experts_cell(51.0, 25.0),
    ),
    "cifar100-conv-moe-layer4-switch": (
        "the same with the switch loss",
        lambda name: conv_moe(name, "layer4", balance="switch"),
        None,
    ),
    "cifar100-conv-moe-layer4-entropy-k2": (
        "the same, entropy loss, with two experts an image, which collapsed in the paper",
        lambda name: conv_moe(name, "layer4", balance="entropy", top_k=2),
        None,
    ),
    "cifar100-resnet50-block-moe-layer4-switch": (
        "BlockMoE on ResNet-50, all blocks of conv5, switch loss",
        lambda name: block_moe(name, "layer4", balance="switch", backbone="resnet50"),
        None,
    ),
    "cifar100-resnet50-block-moe-layer4-entropy": (
        "BlockMoE on ResNet-50, all blocks of conv5, entropy loss",
        lambda name: block_moe(name, "layer4", balance="entropy", backbone="resnet50"),
        None,
    ),
    "cifar100-resnet50-conv-moe-layer4-switch": (
        "ConvMoE on ResNet-50, conv5, switch loss",
        lambda name: conv_moe(name, "layer4", balance="switch", backbone="resnet50"),
        None,
    ),
    "cifar100-resnet50-conv-moe-layer4-entropy": (
        "ConvMoE on ResNet-50, conv5, entropy loss",
        lambda name: conv_moe(name, "layer4", balance="entropy", backbone="resnet50"),
        experts_cell(46.0, 23.6),
    ),
}

RECIPES = {
    name: Recipe(
        make=partial(make, name),
        summary=f"{summary}, CIFAR-100",
        published=published,
    )
    for name, (summary, make, published) in _CELLS.items()
}

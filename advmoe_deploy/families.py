"""Which families of models and which backbones there are, and which go together."""

from typing import Literal

Family = Literal[
    "advmoe", "dense", "pathway", "robust-experts", "expert-networks", "dual-model", "vit-moe"
]
Backbone = Literal[
    "resnet18", "resnet34", "resnet50", "wrn-28-10", "wrn-28-4", "vgg16-bn", "densenet-bc", "vit"
]

# Channels of the first stage before ``ratio``; of DenseNet its growth rate, of a ViT its tokens.
BASE_WIDTH: dict[str, int] = {
    "resnet18": 64,
    "resnet34": 64,
    "resnet50": 64,
    "wrn-28-10": 160,
    "wrn-28-4": 64,
    "vgg16-bn": 64,
    "densenet-bc": 12,
    "vit": 192,
}
# Which backbones each family of routed models can be built on.
BACKBONES: dict[Family, tuple[Backbone, ...]] = {
    "advmoe": (
        "resnet18",
        "resnet34",
        "resnet50",
        "wrn-28-10",
        "wrn-28-4",
        "vgg16-bn",
        "densenet-bc",
    ),
    "robust-experts": ("resnet18", "resnet50"),
    "expert-networks": ("resnet18", "vit"),
    "dual-model": ("resnet18", "vit"),
    "vit-moe": ("vit",),
}

# Families in which a router looks at the whole image, once.
IMAGE_ROUTED: tuple[Family, ...] = ("advmoe", "expert-networks", "dual-model")

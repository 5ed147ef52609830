"""Families of models and their backbones, and the names of the modules that become experts."""

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

# Whose released code wrote a checkpoint that can be imported.
IMPORT_SOURCES = ("advmoe", "robust-experts", "dual-model")

# Families in which a router looks at the whole image, once.
IMAGE_ROUTED: tuple[Family, ...] = ("advmoe", "expert-networks", "dual-model")

ExpertKind = Literal["block", "conv"]

# Residual blocks per stage; those of resnet50 are bottlenecks of three convolutions.
BLOCKS_PER_STAGE: dict[str, tuple[int, ...]] = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


def resnet_modules(backbone: str, kind: ExpertKind) -> tuple[str, ...]:
    """Return the names of all residual blocks of a ResNet, or of their convolutions, in order."""
    bottleneck = backbone == "resnet50"
    names = []
    for stage, count in enumerate(BLOCKS_PER_STAGE[backbone], start=1):
        for index in range(count):
            block = f"layer{stage}.{index}"
            convs = ["conv1", "conv2", *(["conv3"] if bottleneck else [])]
            if index == 0 and (stage > 1 or bottleneck):
                convs.append("downsample.0")
            names += [block] if kind == "block" else [f"{block}.{conv}" for conv in convs]
    return tuple(names)


def expert_modules(backbone: str, kind: ExpertKind, prefixes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the modules that become banks of experts, in the order they are met.

    A prefix stands for every block, or for every convolution, 1x1 ones included, at or below it:
    the released constructor replaces all convolutions whose name holds the prefix.

    Raises:
        ValueError: a prefix names nothing in ``backbone``.
    """
    modules = resnet_modules(backbone, kind)
    for prefix in prefixes:
        if not any(_is_at_or_below(name, prefix) for name in modules):
            near = [n for n in modules if _is_at_or_below(n, prefix.split(".")[0])]
            choices = f"a stage or one of {', '.join(near)}" if near else "layer1 to layer4"
            raise ValueError(f"'{prefix}' names no {kind} of {backbone}; use {choices}")
    return tuple(n for n in modules if any(_is_at_or_below(n, prefix) for prefix in prefixes))


def shortest_prefixes(backbone: str, kind: ExpertKind, modules: set[str]) -> tuple[str, ...]:
    """Return the shortest prefixes that stand for exactly ``modules``."""
    names = resnet_modules(backbone, kind)
    candidates = {".".join(n.split(".")[:depth]) for n in names for depth in (1, 2)} | {*names}
    found: list[str] = []
    for prefix in sorted(candidates, key=lambda p: (p.count("."), p)):
        covered = any(_is_at_or_below(prefix, shorter) for shorter in found)
        if not covered and {n for n in names if _is_at_or_below(n, prefix)} <= modules:
            found.append(prefix)
    return tuple(sorted(found))


def _is_at_or_below(name: str, prefix: str) -> bool:
    return f"{name}.".startswith(f"{prefix}.")

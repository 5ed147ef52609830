"""A toy of every family and of every backbone, for digits."""

from pathlib import Path

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.specs import ExpertLayers, ModelSpec, VisionTransformer

DIGITS = {"width": 8, "image_size": 8, "in_channels": 1, "mean": (0.3,), "std": (0.4,)}
SHAPE = VisionTransformer(patch_size=4, depth=2, heads=2)
VIT = {"backbone": "vit", "transformer": SHAPE}
ADVMOE = {"family": "advmoe", "num_experts": 2, "ratio": 0.5, "router_width": 4}
FAMILIES: dict[str, dict[str, object]] = {
    "conv experts": {
        "family": "robust-experts",
        "num_experts": 3,
        "top_k": 2,
        "weighting": "renormalised",
        "expert_layers": ExpertLayers(kind="conv", layers=("layer4.0",), gate="conv-gap"),
    },
    "block experts": {
        "family": "robust-experts",
        "num_experts": 3,
        "weighting": "probability",
        "expert_layers": ExpertLayers(kind="block", layers=("layer3.1", "layer4.1")),
    },
    "bottleneck experts": {
        "family": "robust-experts",
        "backbone": "resnet50",
        "num_experts": 2,
        "expert_layers": ExpertLayers(kind="conv", layers=("layer4.2.conv3",), gate="double-conv"),
    },
    "ResNet-50": {**ADVMOE, "backbone": "resnet50", "stem": "imagenet"},
    "wide ResNet": {**ADVMOE, "backbone": "wrn-28-4"},
    "VGG": {**ADVMOE, "backbone": "vgg16-bn"},
    "DenseNet": {**ADVMOE, "backbone": "densenet-bc", "width": 4},
    "expert networks": {"family": "expert-networks", "num_experts": 2},
    "dual model": {"family": "dual-model", "num_experts": 2, "alpha": 0.7},
    "dual ViT": {"family": "dual-model", "num_experts": 2, "alpha": 0.25, **VIT},
    "token experts": {
        "family": "vit-moe",
        "num_experts": 3,
        "top_k": 2,
        "weighting": "probability",
        **VIT,
        "transformer": SHAPE.model_copy(update={"moe_blocks": (0, 1)}),
    },
    "dense ViT": {"family": "dense", **VIT},
}

# By name: the run and the bundle.
Families = dict[str, tuple[Path, Bundle]]


def spec_of(family: str) -> ModelSpec:
    """Return the spec of this name."""
    return ModelSpec.model_validate({**DIGITS, **FAMILIES[family]})

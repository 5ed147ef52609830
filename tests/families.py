"""One tiny network of each routed family, with digits: random, but every expert in use."""

from functools import cache

import torch
from torch import Tensor

from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.specs import ModelSpec, build_spec

_DIGITS = {"width": 8, "image_size": 8, "in_channels": 1, "mean": [0.3], "std": [0.4]}
_SPECS: dict[str, dict[str, object]] = {
    "advmoe": {"family": "advmoe", "num_experts": 2, "ratio": 0.5, "router_width": 4},
    "block-experts": {
        "family": "robust-experts",
        "num_experts": 2,
        "expert_layers": {"kind": "block", "layers": ["layer4.1"]},
    },
    "conv-experts": {
        "family": "robust-experts",
        "num_experts": 3,
        "top_k": 2,
        "weighting": "renormalised",
        "expert_layers": {"kind": "conv", "layers": ["layer4.1"]},
    },
    "expert-networks": {"family": "expert-networks", "num_experts": 2},
    "dual-model": {"family": "dual-model", "num_experts": 2, "alpha": 0.7},
    "vit-moe": {
        "family": "vit-moe",
        "backbone": "vit",
        "num_experts": 3,
        "weighting": "probability",
        "transformer": {"patch_size": 2, "depth": 2, "heads": 2, "moe_blocks": [0, 1]},
    },
}
FAMILIES = tuple(_SPECS)


def family_spec(name: str) -> ModelSpec:
    return build_spec(**_SPECS[name], **_DIGITS)


@cache
def family_model(name: str, images: int) -> tuple[Classifier, Tensor, Tensor]:
    """Return the network of this name, float test digits and their labels."""
    test = load_dataset("digits").test
    x, y = torch.from_numpy(to_float(test.images)), torch.from_numpy(test.labels)
    return untrained_model(family_spec(name), x), x[:images], y[:images]

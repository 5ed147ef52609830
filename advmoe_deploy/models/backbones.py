"""Backbones by name. With one expert each is an ordinary dense network.

Every backbone is a module whose ``forward(x_NCHW, dispatch)`` returns logits; ``dispatch`` is
``None`` where there is one expert.
"""

from torch import nn

from advmoe_deploy.models.resnet import ResNet
from advmoe_deploy.models.vit import ViT
from advmoe_deploy.specs import ModelSpec

_BLOCKS_PER_STAGE = {"resnet18": (2, 2, 2, 2)}


def build_backbone(spec: ModelSpec, *, num_experts: int) -> nn.Module:
    """Return the backbone of ``spec`` with ``num_experts`` experts in each routed convolution.

    ``ratio`` scales the experts; of a dense network (family ``dense``) it scales the stem too.
    """
    if spec.backbone == "vit":
        return ViT(spec)
    return ResNet(
        blocks_per_stage=_BLOCKS_PER_STAGE[spec.backbone],
        stem_width=_scaled(spec.width, spec) if spec.family == "dense" else spec.width,
        stage_widths=tuple(_scaled(spec.width * 2**stage, spec) for stage in range(4)),
        in_channels=spec.in_channels,
        num_classes=spec.num_classes,
        num_experts=num_experts,
    )


def _scaled(channels: int, spec: ModelSpec) -> int:
    return int(channels * spec.ratio)

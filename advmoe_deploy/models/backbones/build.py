"""Builders of backbones by name. With one expert each is an ordinary dense network.

Every backbone is a module whose ``forward(x_NCHW, dispatch)`` returns logits; ``dispatch`` is
``None`` where there is one expert. All take images of any size that a spec allows.
"""

from torch import nn

from advmoe_deploy.models.backbones.densenet import DenseNet
from advmoe_deploy.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from advmoe_deploy.models.backbones.vgg import VGG, VGG16_STAGES
from advmoe_deploy.models.backbones.vit import ViT
from advmoe_deploy.models.backbones.wide_resnet import WideResNet
from advmoe_deploy.specs import ModelSpec

RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
WIDENING = {"wrn-28-10": 10, "wrn-28-4": 4}
_WRN_BLOCKS = 4  # (28 - 4) / 6
_DENSENET_LAYERS = (6, 6, 6)  # depth 40


def build_backbone(spec: ModelSpec, *, num_experts: int) -> nn.Module:
    """Return the backbone of ``spec`` with ``num_experts`` experts in each routed convolution."""
    if spec.backbone == "vit":
        return ViT(spec)
    if spec.backbone in RESNETS:
        return _resnet(spec, num_experts)
    if spec.backbone in WIDENING:
        return _wide_resnet(spec, num_experts)
    if spec.backbone == "vgg16-bn":
        return _vgg(spec, num_experts)
    return _densenet(spec, num_experts)


def scaled(channels: int, ratio: float) -> int:
    """Return ``ratio`` times so many channels, as the released code rounds them: down."""
    return int(channels * ratio)


def _resnet(spec: ModelSpec, num_experts: int) -> ResNet:
    block, blocks_per_stage = RESNETS[spec.backbone]
    imagenet = spec.stem == "imagenet"
    return ResNet(
        block=block,
        blocks_per_stage=blocks_per_stage,
        stem_width=scaled(spec.width, spec.ratio) if imagenet else _small_stem(spec, spec.width),
        stage_widths=_doubling(spec, 4),
        in_channels=spec.in_channels,
        num_classes=spec.num_classes,
        num_experts=num_experts,
        imagenet_stem=imagenet,
    )


def _wide_resnet(spec: ModelSpec, num_experts: int) -> WideResNet:
    return WideResNet(
        blocks_per_stage=_WRN_BLOCKS,
        # A toy network may be narrower than the widening factor.
        stem_width=max(1, scaled(spec.width // WIDENING[spec.backbone], spec.ratio)),
        stage_widths=_doubling(spec, 3),
        in_channels=spec.in_channels,
        num_classes=spec.num_classes,
        num_experts=num_experts,
        imagenet_stem=spec.stem == "imagenet",
    )


def _vgg(spec: ModelSpec, num_experts: int) -> VGG:
    return VGG(
        stages=tuple((count, scaled(spec.width * m, spec.ratio)) for count, m in VGG16_STAGES),
        in_channels=spec.in_channels,
        image_size=spec.image_size,
        num_classes=spec.num_classes,
        num_experts=num_experts,
    )


def _densenet(spec: ModelSpec, num_experts: int) -> DenseNet:
    return DenseNet(
        layers_per_stage=_DENSENET_LAYERS,
        stem_width=_small_stem(spec, 2 * spec.width),
        growth=scaled(spec.width, spec.ratio),
        in_channels=spec.in_channels,
        num_classes=spec.num_classes,
        num_experts=num_experts,
        imagenet_stem=spec.stem == "imagenet",
    )


def _doubling(spec: ModelSpec, stages: int) -> tuple[int, ...]:
    return tuple(scaled(spec.width * 2**stage, spec.ratio) for stage in range(stages))


def _small_stem(spec: ModelSpec, width: int) -> int:
    """Return the width of a stem that the experts share at full width; S-Dense scales it too."""
    shared = spec.family in ("advmoe", "pathway")
    return width if shared else scaled(width, spec.ratio)

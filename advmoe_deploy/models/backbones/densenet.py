"""DenseNet-BC (Huang et al., arXiv 1608.06993) with routed convolutions.

AdvMoE names "DenseNet" without depth or growth, and the released constructor crashes. This is
DenseNet-BC with growth 12 and depth 40, three stages of six layers: 0.072 G multiply-accumulates at
32x32, which is the paper's 0.07 G. Every convolution after the stem is routed; the stem keeps its
width in a mixture of experts, as that of the small ResNets.

Shapes: N images, C channels, H height, W width, E experts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.models.backbones.layers import RoutedConv2d, global_average, shared_conv2d
from advmoe_deploy.models.routing.dispatch import Dispatch

_BOTTLENECK = 4


class DenseLayer(nn.Module):
    """A 1x1 and a 3x3 routed convolution; what they add is appended to the channels."""

    def __init__(self, in_channels: int, growth: int, num_experts: int) -> None:
        super().__init__()
        width = _BOTTLENECK * growth
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = RoutedConv2d(in_channels, width, 1, 1, num_experts)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = RoutedConv2d(width, growth, 3, 1, num_experts)

    def forward(self, x_NCHW: Tensor, dispatch: Dispatch | None) -> Tensor:
        """Return [N, C + growth, H, W]."""
        h = self.conv1(F.relu(self.bn1(x_NCHW)), dispatch)
        h = self.conv2(F.relu(self.bn2(h)), dispatch)
        return torch.cat([x_NCHW, h], dim=1)


class Transition(nn.Module):
    """Half the channels, half the size; one pixel is not halved any more."""

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = RoutedConv2d(in_channels, in_channels // 2, 1, 1, num_experts)

    def forward(self, x_NCHW: Tensor, dispatch: Dispatch | None) -> Tensor:
        """Return [N, C / 2, H / 2, W / 2]."""
        h = self.conv(F.relu(self.bn(x_NCHW)), dispatch)
        return F.avg_pool2d(h, 2) if h.shape[-1] > 1 else h


class DenseNet(nn.Module):
    """Stem, stages of dense layers with transitions between them, average pool, linear head."""

    def __init__(
        self,
        *,
        layers_per_stage: tuple[int, ...],
        stem_width: int,
        growth: int,
        in_channels: int,
        num_classes: int,
        num_experts: int = 1,
        imagenet_stem: bool = False,
    ) -> None:
        super().__init__()
        kernel, stride = (7, 2) if imagenet_stem else (3, 1)
        self.conv1 = shared_conv2d(in_channels, stem_width, kernel, stride)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet_stem else nn.Identity()
        channels = stem_width
        self.layers = nn.ModuleList()
        for stage, count in enumerate(layers_per_stage):
            if stage:
                self.layers.append(Transition(channels, num_experts))
                channels //= 2
            for _ in range(count):
                self.layers.append(DenseLayer(channels, growth, num_experts))
                channels += growth
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x_NCHW: Tensor, dispatch: Dispatch | None = None) -> Tensor:
        """Return logits [N, classes] in the order of ``x_NCHW``."""
        if dispatch is not None:
            x_NCHW = dispatch.dispatch(x_NCHW)
        h = self.pool(self.conv1(x_NCHW))
        for layer in self.layers:
            h = layer(h, dispatch)
        logits = self.linear(global_average(F.relu(self.bn(h))))
        return dispatch.combine(logits) if dispatch is not None else logits

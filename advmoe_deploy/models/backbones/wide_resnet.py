"""Wide ResNets (Zagoruyko and Komodakis, arXiv 1605.07146) with routed convolutions.

As AdvMoE's released network: pre-activation, every convolution after the stem routed, the 1x1
shortcuts included, and the stem scaled by ``ratio`` like everything else. Where a block changes the
number of channels, both its branch and its shortcut start at the block's input as it is: the
released code makes a BatchNorm there and then does not use its output, so here there is none.

Shapes: N images, C channels, H height, W width, E experts.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.models.backbones.layers import RoutedConv2d, global_average, shared_conv2d
from advmoe_deploy.models.routing.dispatch import Dispatch


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before two 3x3 convolutions, before the second alone beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, num_experts: int) -> None:
        super().__init__()
        same = in_channels == channels
        self.bn1 = nn.BatchNorm2d(in_channels) if same else None
        self.conv1 = RoutedConv2d(in_channels, channels, 3, stride, num_experts)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = RoutedConv2d(channels, channels, 3, 1, num_experts)
        shape = (in_channels, channels, 1, stride, num_experts)
        self.shortcut = None if same else RoutedConv2d(*shape)

    def forward(self, x_NCHW: Tensor, dispatch: Dispatch | None) -> Tensor:
        """Return [N, channels, H / stride, W / stride]."""
        h = x_NCHW if self.bn1 is None else F.relu(self.bn1(x_NCHW))
        skip = x_NCHW if self.shortcut is None else self.shortcut(x_NCHW, dispatch)
        h = F.relu(self.bn2(self.conv1(h, dispatch)))
        y_NCHW: Tensor = skip + self.conv2(h, dispatch)
        return y_NCHW


class WideResNet(nn.Module):
    """Stem, three stages of pre-activation blocks, BatchNorm, average pool, linear head."""

    def __init__(
        self,
        *,
        blocks_per_stage: int,
        stem_width: int,
        stage_widths: tuple[int, ...],
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
        self.stages = nn.ModuleList()
        for index, width in enumerate(stage_widths):
            blocks = nn.ModuleList()
            for position in range(blocks_per_stage):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(PreActivationBlock(channels, width, stride, num_experts))
                channels = width
            self.stages.append(blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x_NCHW: Tensor, dispatch: Dispatch | None = None) -> Tensor:
        """Return logits [N, classes] in the order of ``x_NCHW``."""
        if dispatch is not None:
            x_NCHW = dispatch.dispatch(x_NCHW)
        h = self.pool(self.conv1(x_NCHW))
        for blocks in self.stages:
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, dispatch)
        logits = self.linear(global_average(F.relu(self.bn(h))))
        return dispatch.combine(logits) if dispatch is not None else logits

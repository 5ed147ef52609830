"""ResNets with routed convolutions.

AdvMoE (Zhang et al., ICCV 2023, arXiv 2308.10110): every convolution of the residual branches holds
E experts of ``ratio`` times the dense width; stem, BatchNorms and head are shared, and so are the
1x1 shortcuts of the networks for small images. A network with one expert is an ordinary dense one.

Shapes: N images, C channels, H height, W width, E experts.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.models.backbones.layers import (
    RoutedConv2d,
    convolve,
    global_average,
    shared_conv2d,
)
from advmoe_deploy.models.routing.dispatch import Dispatch


class Shortcut(nn.Module):
    """A 1x1 convolution and BatchNorm beside a residual branch."""

    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x_NCHW: Tensor, dispatch: Dispatch | None) -> Tensor:
        """Return [N, channels, H / stride, W / stride]."""
        y_NCHW: Tensor = self.bn(convolve(self.conv, x_NCHW, dispatch))
        return y_NCHW


class _Block(nn.Module):
    """Base of the two residual blocks: the shortcut and the sum."""

    expansion = 1

    def __init__(
        self, in_channels: int, width: int, stride: int, num_experts: int, routed_shortcut: bool
    ) -> None:
        super().__init__()
        self.out_channels = width * self.expansion
        self.shortcut: Shortcut | None = None
        if stride != 1 or in_channels != self.out_channels:
            shape = (in_channels, self.out_channels, 1, stride)
            conv = RoutedConv2d(*shape, num_experts) if routed_shortcut else shared_conv2d(*shape)
            self.shortcut = Shortcut(conv, self.out_channels)

    def forward(self, x_NCHW: Tensor, dispatch: Dispatch | None = None) -> Tensor:
        """Return [N, out_channels, H / stride, W / stride]."""
        skip = x_NCHW if self.shortcut is None else self.shortcut(x_NCHW, dispatch)
        return F.relu(self.branch(x_NCHW, dispatch) + skip)

    def branch(self, x_NCHW: Tensor, dispatch: Dispatch | None) -> Tensor:
        """Return the residual branch."""
        raise NotImplementedError


class BasicBlock(_Block):
    """Two routed 3x3 convolutions."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        num_experts: int = 1,
        routed_shortcut: bool = False,
    ) -> None:
        super().__init__(in_channels, width, stride, num_experts, routed_shortcut)
        self.conv1 = RoutedConv2d(in_channels, width, 3, stride, num_experts)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = RoutedConv2d(width, width, 3, 1, num_experts)
        self.bn2 = nn.BatchNorm2d(width)

    def branch(self, x_NCHW: Tensor, dispatch: Dispatch | None) -> Tensor:
        """Return the residual branch."""
        h = F.relu(self.bn1(self.conv1(x_NCHW, dispatch)))
        y_NCHW: Tensor = self.bn2(self.conv2(h, dispatch))
        return y_NCHW


class Bottleneck(_Block):
    """A routed 3x3 convolution between two routed 1x1 ones; the second widens fourfold."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        num_experts: int = 1,
        routed_shortcut: bool = False,
    ) -> None:
        super().__init__(in_channels, width, stride, num_experts, routed_shortcut)
        self.conv1 = RoutedConv2d(in_channels, width, 1, 1, num_experts)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = RoutedConv2d(width, width, 3, stride, num_experts)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = RoutedConv2d(width, self.out_channels, 1, 1, num_experts)
        self.bn3 = nn.BatchNorm2d(self.out_channels)

    def branch(self, x_NCHW: Tensor, dispatch: Dispatch | None) -> Tensor:
        """Return the residual branch."""
        h = F.relu(self.bn1(self.conv1(x_NCHW, dispatch)))
        h = F.relu(self.bn2(self.conv2(h, dispatch)))
        y_NCHW: Tensor = self.bn3(self.conv3(h, dispatch))
        return y_NCHW


class ResNet(nn.Module):
    """Stem, four stages of residual blocks, average pool, linear head.

    ``imagenet_stem`` is a 7x7 convolution with stride 2 and a max-pool instead of a 3x3 one; the
    released network that has it routes its shortcuts too.
    """

    def __init__(
        self,
        *,
        block: type[BasicBlock] | type[Bottleneck],
        blocks_per_stage: tuple[int, ...],
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
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet_stem else nn.Identity()
        channels = stem_width
        self.stages = nn.ModuleList()
        for index, (count, width) in enumerate(zip(blocks_per_stage, stage_widths, strict=True)):
            strides = [1 if index == 0 else 2] + [1] * (count - 1)
            blocks = nn.ModuleList()
            for stride in strides:
                blocks.append(block(channels, width, stride, num_experts, imagenet_stem))
                channels = width * block.expansion
            self.stages.append(blocks)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x_NCHW: Tensor, dispatch: Dispatch | None = None) -> Tensor:
        """Return logits [N, classes] in the order of ``x_NCHW``."""
        if dispatch is not None:
            x_NCHW = dispatch.dispatch(x_NCHW)
        h = self.pool(F.relu(self.bn1(self.conv1(x_NCHW))))
        for blocks in self.stages:
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, dispatch)
        logits = self.linear(global_average(h))
        return dispatch.combine(logits) if dispatch is not None else logits

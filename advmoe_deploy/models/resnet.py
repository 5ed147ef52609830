"""ResNet-18 for small images with routed convolutions, and the small ResNet that routes them.

AdvMoE (Zhang et al., ICCV 2023, arXiv 2308.10110): every 3x3 convolution of the residual blocks
holds E experts of ``ratio`` times the dense width; stem, shortcuts, BatchNorms and head are shared.
A network with one expert is an ordinary dense ResNet-18.

Shapes: N images, C channels, H height, W width, E experts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.models.dispatch import Dispatch


class RoutedConv2d(nn.Module):
    """A bank of ``num_experts`` 3x3 convolutions; without a dispatch, a plain convolution.

    ``weight`` is [E * C_out, C_in, 3, 3], expert after expert.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, num_experts: int) -> None:
        super().__init__()
        self.stride = stride
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts * out_channels, in_channels, 3, 3))
        for expert in self.weight.chunk(num_experts):
            nn.init.kaiming_normal_(expert, mode="fan_out", nonlinearity="relu")

    def forward(self, x_NCHW: Tensor, dispatch: Dispatch | None) -> Tensor:
        """Return [N, C_out, H / stride, W / stride]."""
        if dispatch is None:
            assert self.num_experts == 1, "a bank of experts needs a dispatch"
            return F.conv2d(x_NCHW, self.weight, stride=self.stride, padding=1)
        return dispatch.conv2d(x_NCHW, self.weight, self.stride, padding=1)


class BasicBlock(nn.Module):
    """Two routed 3x3 convolutions and a shortcut that all experts share."""

    def __init__(self, in_channels: int, channels: int, stride: int, num_experts: int) -> None:
        super().__init__()
        self.conv1 = RoutedConv2d(in_channels, channels, stride, num_experts)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = RoutedConv2d(channels, channels, 1, num_experts)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x_NCHW: Tensor, dispatch: Dispatch | None) -> Tensor:
        """Return [N, channels, H / stride, W / stride]."""
        h = F.relu(self.bn1(self.conv1(x_NCHW, dispatch)))
        h = self.bn2(self.conv2(h, dispatch))
        return F.relu(h + self.shortcut(x_NCHW))


class ResNet(nn.Module):
    """ResNet for 32x32 and smaller images: 3x3 stem, four stages, average pool, linear head."""

    def __init__(
        self,
        *,
        blocks_per_stage: tuple[int, ...],
        stem_width: int,
        stage_widths: tuple[int, ...],
        in_channels: int,
        num_classes: int,
        num_experts: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem_width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(stem_width)
        channels = stem_width
        self.stages = nn.ModuleList()
        for index, (count, width) in enumerate(zip(blocks_per_stage, stage_widths, strict=True)):
            strides = [1 if index == 0 else 2] + [1] * (count - 1)
            blocks = nn.ModuleList()
            for stride in strides:
                blocks.append(BasicBlock(channels, width, stride, num_experts))
                channels = width
            self.stages.append(blocks)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x_NCHW: Tensor, dispatch: Dispatch | None = None) -> Tensor:
        """Return logits [N, classes] in the order of ``x_NCHW``."""
        if dispatch is not None:
            x_NCHW = dispatch.dispatch(x_NCHW)
        h = F.relu(self.bn1(self.conv1(x_NCHW)))
        for blocks in self.stages:
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, dispatch)
        logits = self.linear(F.adaptive_avg_pool2d(h, 1).flatten(1))
        return dispatch.combine(logits) if dispatch is not None else logits


class RouterBlock(nn.Module):
    """A basic block with the parameter-free shortcut (option A): strided slice, zero channels."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.added_channels = channels - in_channels

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return [N, channels, H / stride, W / stride]."""
        h = F.relu(self.bn1(self.conv1(x_NCHW)))
        h = self.bn2(self.conv2(h))
        before = self.added_channels // 2
        after = self.added_channels - before
        skip = x_NCHW[:, :, :: self.stride, :: self.stride]
        if self.added_channels:
            skip = F.pad(skip, (0, 0, 0, 0, before, after))
        return F.relu(h + skip)


class RouterResNet(nn.Module):
    """The CIFAR ResNet-20 that scores the experts of one image (AdvMoE's router)."""

    def __init__(self, in_channels: int, width: int, num_experts: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks = []
        channels = width
        for stage in range(3):
            for index in range(3):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(RouterBlock(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_experts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return scores [N, E]."""
        h = self.blocks(F.relu(self.bn1(self.conv1(x_NCHW))))
        scores: Tensor = self.fc(F.adaptive_avg_pool2d(h, 1).flatten(1))
        return scores

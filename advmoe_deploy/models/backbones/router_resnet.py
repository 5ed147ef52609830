"""Router of AdvMoE: the small ResNet that scores the experts of one image.

Shapes: N images, C channels, H height, W width, E experts.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.models.backbones.layers import global_average, shared_conv2d


class RouterBlock(nn.Module):
    """A basic block with the parameter-free shortcut (option A): strided slice, zero channels."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = shared_conv2d(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = shared_conv2d(channels, channels, 3)
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
    """The CIFAR ResNet-20: three stages of three blocks."""

    def __init__(self, in_channels: int, width: int, num_experts: int) -> None:
        super().__init__()
        self.conv1 = shared_conv2d(in_channels, width, 3)
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

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return scores [N, E]."""
        h = self.blocks(F.relu(self.bn1(self.conv1(x_NCHW))))
        scores: Tensor = self.fc(global_average(h))
        return scores

"""Layers that every convolutional backbone is built from.

Shapes: N images, C channels, H height, W width, E experts.
"""

from torch import Tensor, empty, nn
from torch.nn import functional as F

from advmoe_deploy.models.routing.dispatch import Dispatch


class RoutedConv2d(nn.Module):
    """A bank of ``num_experts`` square convolutions; without a dispatch, a plain convolution.

    ``weight`` is [E * C_out, C_in, kernel, kernel], expert after expert. Padding keeps the size of
    the image, but for the stride.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, num_experts: int
    ) -> None:
        super().__init__()
        self.stride = stride
        self.padding = kernel // 2
        self.num_experts = num_experts
        self.weight = nn.Parameter(empty(num_experts * out_channels, in_channels, kernel, kernel))
        for expert in self.weight.chunk(num_experts):
            nn.init.kaiming_normal_(expert, mode="fan_out", nonlinearity="relu")

    def forward(self, x_NCHW: Tensor, dispatch: Dispatch | None) -> Tensor:
        """Return [N, C_out, H / stride, W / stride]."""
        if dispatch is None:
            assert self.num_experts == 1, "a bank of experts needs a dispatch"
            return F.conv2d(x_NCHW, self.weight, stride=self.stride, padding=self.padding)
        return dispatch.conv2d(x_NCHW, self.weight, self.stride, self.padding)


def shared_conv2d(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution that all experts share: no bias, padded as :class:`RoutedConv2d`."""
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def convolve(conv: nn.Module, x_NCHW: Tensor, dispatch: Dispatch | None) -> Tensor:
    """Return the output of a convolution that may be routed."""
    y_NCHW: Tensor = conv(x_NCHW, dispatch) if isinstance(conv, RoutedConv2d) else conv(x_NCHW)
    return y_NCHW


def global_average(x_NCHW: Tensor) -> Tensor:
    """Return the mean of each map, [N, C]."""
    return F.adaptive_avg_pool2d(x_NCHW, 1).flatten(1)

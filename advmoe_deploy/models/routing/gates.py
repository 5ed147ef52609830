"""Router gates of Robust Experts (arXiv 2509.05086): a layer's input to raw scores of experts.

Softmax is left to the routing. Two gates are fixed: their weights are buffers, which are saved but
belong to no optimizer.

Shapes: N images, C channels, H height, W width, E experts.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.specs import Gate

# Channels between the two convolutions of ``double-conv``.
_MIDDLE_CHANNELS = 8


class ScoreConv2d(nn.Conv2d):
    """A bias-free convolution without padding, as released, where the map has room for it.

    A smaller map, which the released gate cannot run on, gets the least padding that will do.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return [N, C_out, H - k + 1, W - k + 1]."""
        missing = max(0, self.kernel_size[0] - min(x_NCHW.shape[2:]))
        return F.conv2d(x_NCHW, self.weight, padding=(missing + 1) // 2)


def build_gate(name: Gate, in_channels: int, num_experts: int) -> nn.Module:
    """Return the gate of this name: a module from [N, C, H, W] to raw scores [N, E]."""
    return _GATES[name](in_channels, num_experts)


def _gap_fc(in_channels: int, num_experts: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_experts))


def _conv_gap(in_channels: int, num_experts: int, kernel_size: int = 1) -> nn.Module:
    conv = ScoreConv2d(in_channels, num_experts, kernel_size)
    return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _conv3_gap(in_channels: int, num_experts: int) -> nn.Module:
    return _conv_gap(in_channels, num_experts, kernel_size=3)


def _double_conv(in_channels: int, num_experts: int) -> nn.Module:
    # No activation in between: so it is in the released code.
    return nn.Sequential(
        ScoreConv2d(in_channels, _MIDDLE_CHANNELS, 3),
        nn.BatchNorm2d(_MIDDLE_CHANNELS),
        ScoreConv2d(_MIDDLE_CHANNELS, num_experts, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def _fixed_gap_fc(in_channels: int, num_experts: int) -> nn.Module:
    """Score each expert by the pooled input's product with a random vector of its own."""
    linear = nn.Linear(in_channels, num_experts, bias=False)
    nn.init.normal_(linear.weight)
    return _fixed(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear))


def _fixed_conv_gap(in_channels: int, num_experts: int) -> nn.Module:
    """Score expert e by the mean of channel e: a 1x1 convolution that picks the first E."""
    conv = ScoreConv2d(in_channels, num_experts, 1)
    nn.init.dirac_(conv.weight)
    return _fixed(nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def _fixed(gate: nn.Module) -> nn.Module:
    """Turn the parameters of ``gate`` into buffers."""
    for module in gate.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return gate


_GATES: dict[Gate, Callable[[int, int], nn.Module]] = {
    "gap-fc": _gap_fc,
    "conv-gap": _conv_gap,
    "conv3-gap": _conv3_gap,
    "double-conv": _double_conv,
    "fixed-gap-fc": _fixed_gap_fc,
    "fixed-conv-gap": _fixed_conv_gap,
}

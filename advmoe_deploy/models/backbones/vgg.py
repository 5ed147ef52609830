"""VGG-16 with BatchNorm (Simonyan and Zisserman, arXiv 1409.1556) with routed convolutions.

As AdvMoE's released network: the last max-pool is left out, the head is three linear layers of 256,
256 and the classes, every convolution but the first is routed, and ``ratio`` scales that one too.

Shapes: N images, C channels, H height, W width, E experts.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.models.backbones.layers import RoutedConv2d, convolve, shared_conv2d
from advmoe_deploy.models.routing.dispatch import Dispatch

# Convolutions per stage, and the width of each stage as a multiple of the first.
VGG16_STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))
_HEAD = 256


class VGG(nn.Module):
    """Stages of 3x3 convolutions, halved in between while there is more than one pixel."""

    def __init__(
        self,
        *,
        stages: tuple[tuple[int, int], ...],
        in_channels: int,
        image_size: int,
        num_classes: int,
        num_experts: int = 1,
    ) -> None:
        """Build the network.

        Args:
            stages: for each stage, its number of convolutions and their channels.
            in_channels: of the images.
            image_size: height and width of the images; the head looks at every remaining pixel.
            num_classes: number of logits.
            num_experts: experts per routed convolution.
        """
        super().__init__()
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        self.last_of_stage = []
        channels = in_channels
        for count, width in stages:
            for _ in range(count):
                first = not self.convs
                conv = (
                    shared_conv2d(channels, width, 3)
                    if first
                    else RoutedConv2d(channels, width, 3, 1, num_experts)
                )
                self.convs.append(conv)
                self.norms.append(nn.BatchNorm2d(width))
                channels = width
            self.last_of_stage.append(len(self.convs) - 1)
        side = max(1, image_size // 2 ** (len(stages) - 1))
        self.head = nn.Sequential(
            nn.Linear(channels * side * side, _HEAD),
            nn.ReLU(),
            nn.Linear(_HEAD, _HEAD),
            nn.ReLU(),
            nn.Linear(_HEAD, num_classes),
        )

    def forward(self, x_NCHW: Tensor, dispatch: Dispatch | None = None) -> Tensor:
        """Return logits [N, classes] in the order of ``x_NCHW``."""
        h = x_NCHW if dispatch is None else dispatch.dispatch(x_NCHW)
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = F.relu(norm(convolve(conv, h, dispatch)))
            if index in self.last_of_stage[:-1] and h.shape[-1] > 1:
                h = F.max_pool2d(h, 2)
        logits: Tensor = self.head(h.flatten(1))
        return dispatch.combine(logits) if dispatch is not None else logits

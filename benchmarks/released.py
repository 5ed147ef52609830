"""AdvMoE's layer as the released code works, in our own words: what the benchmarks compare with."""

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.models.routing.dispatch import Dispatch


class ReleasedDispatch(Dispatch):
    """Computes every expert, multiplies all by a mask, and only then copies the chosen one's."""

    def conv2d(self, x_NCHW: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        """Return each row's convolution with its own expert, times its routing weight."""
        every = F.conv2d(x_NCHW, weight, stride=stride, padding=padding)
        n, channels, height, width = every.shape
        experts = self.routing.num_experts
        ids_NK, weights_NK = self.routing.expert_ids_NK, self.routing.weights_NK
        mask_NE = torch.zeros(n, experts, dtype=every.dtype).scatter(1, ids_NK, weights_NK)
        mask_NC = mask_NE.repeat_interleave(channels // experts, dim=1)
        masked = (every * mask_NC[:, :, None, None]).view(n, experts, -1, height, width)
        return masked[torch.arange(n), ids_NK[:, 0]]

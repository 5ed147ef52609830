"""Random numbers of one part of a batch, the same however many processes share it.

Shapes: N images, T tokens per image, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomNumbers:
    """Each draw is made for all ``total`` images, and this process takes the rows ``mine``.

    ``generator`` is on the CPU, so that the same seed gives the same numbers on every device.
    """

    generator: torch.Generator
    total: int
    mine: slice

    def normal(self, like_NX: Tensor) -> Tensor:
        """Return standard normal numbers in the shape of this process's images."""
        drawn = torch.randn((self.total, *like_NX.shape[1:]), generator=self.generator)
        return drawn[self.mine].to(like_NX)

    def uniform(self, like_NX: Tensor) -> Tensor:
        """Return numbers uniform in [-1, 1] in the shape of this process's images."""
        drawn = torch.rand((self.total, *like_NX.shape[1:]), generator=self.generator)
        return drawn[self.mine].mul(2).sub(1).to(like_NX)

    def normal_scores(self, scores_NE: Tensor, copies: int) -> Tensor:
        """Return standard normal numbers for scores of ``copies`` * images * tokens rows."""
        images = len(range(self.total)[self.mine])
        tokens, experts = len(scores_NE) // (copies * images), scores_NE.shape[1]
        shape = (copies, self.total, tokens, experts)
        drawn = torch.randn(shape, generator=self.generator)[:, self.mine]
        return drawn.reshape(scores_NE.shape).to(scores_NE)

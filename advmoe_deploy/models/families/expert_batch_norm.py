"""BatchNorm for experts, whose number of rows varies."""

from torch import Tensor, nn
from torch.nn import functional as F


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that a single value per channel does not stop in training.

    An expert may get one row, and small images end in 1x1 maps: one value has no variance, so such
    a group is normalised by the running statistics, which it leaves as they are.
    """

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return the normalised ``x_NCHW``."""
        if not self.training or x_NCHW.numel() > self.num_features:
            return super().forward(x_NCHW)
        return F.batch_norm(
            x_NCHW, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


def replace_batch_norms(module: nn.Module) -> nn.Module:
    """Return ``module``, fresh, with a :class:`BatchNorm2d` in the place of each of torch's own."""
    for name, norm in list(module.named_modules()):
        if type(norm) is nn.BatchNorm2d:
            module.set_submodule(name, BatchNorm2d(norm.num_features))
    return module

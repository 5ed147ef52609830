"""Collectives of processes that share each batch and compute what one process would.

Sums over the batch are sums over the processes, in the forward pass and in the backward pass:
BatchNorm's statistics, and losses that are no mean over rows.

A loss that every process computes from its own rows is scaled by its share of the batch; one that
each computes whole, from gathered rows, counts once. Either way the mean over the processes of the
gradients is the gradient of the loss of the whole batch.

Shapes: N images, C channels, H height, W width.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F


class _Sum(torch.autograd.Function):
    """The sum over the processes, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(gradients[0])  # type: ignore[no-untyped-call]
        return total


def process_count() -> int:
    """Return how many processes share each batch."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def summed(tensor: Tensor) -> Tensor:
    """Return the sum over the processes of what each has; differentiable."""
    if process_count() == 1:
        return tensor
    total: Tensor = _Sum.apply(tensor)  # type: ignore[no-untyped-call]
    return total


def all_gathered(rows: Tensor) -> Tensor:
    """Return the rows of all processes, those of the first process first; differentiable."""
    processes = process_count()
    if processes == 1:
        return rows
    counts = torch.zeros(processes, dtype=torch.int64, device=rows.device)
    counts[distributed.get_rank()] = len(rows)
    counts_list: list[int] = summed(counts).tolist()
    before = sum(counts_list[: distributed.get_rank()])
    after = sum(counts_list) - before - len(rows)
    return summed(F.pad(rows, [0, 0] * (rows.dim() - 1) + [before, after]))


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose batch statistics are those of all processes' rows.

    Unlike torch's own it runs on a CPU, too, and it takes part where a process has no rows. Where
    all processes together have one value per channel, or none, the running statistics serve.
    """

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return the normalised ``x_NCHW``."""
        if not self.training:
            return super().forward(x_NCHW)
        x = x_NCHW.to(self.weight.dtype)  # float32, where the network runs in half precision
        sums_C1 = torch.cat([x.sum((0, 2, 3)), x.new_tensor([x.numel() // x.shape[1]])])
        *_, count = totals = summed(sums_C1)
        count = count.detach()
        enough = count > 1
        mean_C = totals[:-1] / count.clamp(min=1)
        centred = x - mean_C[:, None, None]
        squares_C = summed(centred.square().sum((0, 2, 3)))
        self._remember(mean_C.detach(), squares_C.detach() / (count - 1).clamp(min=1), enough)
        assert self.running_mean is not None
        assert self.running_var is not None
        mean_C = torch.where(enough, mean_C, self.running_mean)
        variance_C = torch.where(enough, squares_C / count.clamp(min=1), self.running_var)
        scale_C = self.weight * (variance_C + self.eps).rsqrt()
        y = (x - mean_C[:, None, None]) * scale_C[:, None, None] + self.bias[:, None, None]
        return y.to(x_NCHW.dtype)

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, variance_C: Tensor, enough: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        share = self.momentum * enough.to(mean_C.dtype)
        self.running_mean.lerp_(mean_C, share)
        self.running_var.lerp_(variance_C, share)
        self.num_batches_tracked.add_(enough)


def synchronise(model: nn.Module) -> None:
    """Put a :class:`SynchronisedBatchNorm2d` in the place of each BatchNorm, with its tensors."""
    for name, norm in list(model.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            shared = SynchronisedBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
            shared.weight, shared.bias = norm.weight, norm.bias
            shared.running_mean, shared.running_var = norm.running_mean, norm.running_var
            shared.num_batches_tracked = norm.num_batches_tracked
            model.set_submodule(name, shared.train(norm.training))

"""Forward pass in training: precision, surrogate gradients, noise and capacity.

Shapes: N images, E experts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from advmoe_deploy.models.routing.routing import Routes, Routing, RoutingRule, Surrogate

RoutedForward = Callable[[Tensor, Routes], Tensor]
# Given the images of a pass, the routings it must take.
Forced = Callable[[Tensor], Mapping[str, Routing]]
# Given the number of images of a pass, what to do to its scores.
Adjustment = Callable[[int], Callable[[RoutingRule, Tensor, Surrogate | None], Routing]]
HALF = (torch.bfloat16, torch.float16)


class ForwardPass:
    """One way to run the model; ``taken`` holds each layer's last routing that was not forced.

    Logits and the scores of routers are never in half precision, whatever the rest runs in: a
    rounded score sends images elsewhere.
    """

    def __init__(
        self,
        call: RoutedForward,
        *,
        surrogate: Surrogate | None = None,
        forced: Forced | None = None,
        adjust: Adjustment | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._call = call
        self._surrogate = surrogate
        self._forced = forced
        self._adjust = adjust
        self._autocast = autocast
        self.taken: dict[str, Routing] = {}

    def __call__(self, x_NCHW: Tensor, routes: Routes | None = None) -> Tensor:
        """Return logits [N, classes]; ``routes`` overrule this pass's own."""
        precise = self._routes(x_NCHW, routes)
        if self._adjust is not None:
            precise.adjust = self._adjust(len(x_NCHW))
        with self._autocast():
            logits = full_precision(self._call(x_NCHW, precise))
        if routes is not None:
            routes.taken.update(precise.taken)
        self.taken |= {k: v for k, v in precise.taken.items() if k not in precise.forced}
        return logits

    def _routes(self, x_NCHW: Tensor, given: Routes | None) -> Routes:
        if given is None:
            forced = None if self._forced is None else self._forced(x_NCHW)
            return _PreciseRoutes(forced, surrogate=self._surrogate)
        return _PreciseRoutes(given.forced, surrogate=given.surrogate, execution=given.execution)


class _PreciseRoutes(Routes):
    """Routes whose gates run in full precision."""

    def decide(self, rule: RoutingRule, gate: Callable[[Tensor], Tensor], x: Tensor) -> Routing:
        def precise(rows: Tensor) -> Tensor:
            with torch.autocast(rows.device.type, enabled=False):
                return gate(full_precision(rows))

        return super().decide(rule, precise, x)


def full_precision(tensor: Tensor) -> Tensor:
    """Return ``tensor``, as float32 if it is in half precision."""
    return tensor.float() if tensor.dtype in HALF else tensor


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm use the batch's statistics for the block, and learn nothing from it."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m, m.training, m.track_running_stats) for m in norms]
    for m in norms:
        m.training, m.track_running_stats = True, False
    try:
        yield
    finally:
        for m, training, tracked in before:
            m.training, m.track_running_stats = training, tracked

"""Base class of image classifiers: images in [0, 1] in, logits out, routes on request."""

import torch
from torch import Tensor, nn

from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.routing.routing import Routes, Routing, RoutingRule
from advmoe_deploy.specs import ModelSpec

ROUTER_NAMES = frozenset({"router", "gate"})


class Normalise(nn.Module):
    """(x - mean) / std per channel; nothing at all for mean 0 and std 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.is_identity = set(mean) == {0.0} and set(std) == {1.0}
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalised images."""
        return images if self.is_identity else (images - self.mean) / self.std


class Classifier(nn.Module):
    """An image classifier. Parameters of routers lie under a module called router or gate.

    ``forward(images, routes=None)`` takes float images [N, C, H, W] in [0, 1], normalises them
    inside and returns logits [N, classes]; ``routes`` sees and overrules the routing.
    """

    # The routed layers in the order they are met; none for a dense network.
    rules: tuple[RoutingRule, ...] = ()
    # True where the answer to an image depends on who else is in the batch.
    shares_batch = False

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.normalise = Normalise(spec.mean, spec.std)

    def route(self, images: Tensor) -> dict[str, Routing]:
        """Return the routing of each routed layer for ``images``, as the deployed model routes."""
        routes = Routes()
        self(images, routes)
        return routes.taken

    @property
    def experts_in_use(self) -> tuple[int, ...]:
        """The experts that some layer can send rows to, ascending."""
        return tuple(sorted({expert for rule in self.rules for expert in rule.kept}))

    def unrolled(self) -> nn.Module:
        """Return the same function, of images and routes, with each expert a module of its own.

        It is what the exporter cuts into segments.
        """
        return self

    def forced(self, expert: int) -> Routes:
        """Return routes that send every row of every layer to ``expert``, or the layer's last."""
        return Routes({rule.layer: rule.or_last(expert) for rule in self.rules})


def is_router_parameter(name: str) -> bool:
    """Return whether the parameter of this dotted name belongs to a router."""
    return not ROUTER_NAMES.isdisjoint(name.split("."))


def require_routes(model: Classifier) -> Classifier:
    """Return ``model`` if it routes.

    Raises:
        UsageError: the model is dense.
    """
    if not model.rules:
        raise UsageError("this model is dense and routes nothing; train an MoE recipe")
    return model

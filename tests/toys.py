"""Routed models so small that the answer to every question about them is known by hand."""

import torch
from torch import Tensor, nn

from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.dispatch import run_experts
from advmoe_deploy.models.routing.routing import Routes, RoutingRule
from advmoe_deploy.specs import ModelSpec, Weighting


def toy_spec(classes: int = 2, *, size: int = 4, std: float = 1.0) -> ModelSpec:
    """Return a spec of grey images; what is built from it is up to the toy."""
    return ModelSpec(
        family="expert-networks",
        num_experts=2,
        num_classes=classes,
        in_channels=1,
        image_size=size,
        mean=(0.0,),
        std=(std,),
    )


class Linear(nn.Module):
    """x -> flat x @ weight.T + bias, with the weights given."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(weight.shape[1], weight.shape[0])
        self.fc.weight.data, self.fc.bias.data = weight.clone(), bias.clone()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.fc(x_NCHW.flatten(1))  # type: ignore[no-any-return]


class LinearMoE(Classifier):
    """Linear experts behind a linear router that looks at the image."""

    def __init__(self, spec: ModelSpec, router: Linear, experts: list[Linear]) -> None:
        super().__init__(spec)
        self.rules = (RoutingRule("router", len(experts)),)
        self.router = router
        self.experts = nn.ModuleList(experts)

    def forward(self, images: Tensor, routes: Routes | None = None) -> Tensor:
        routes = routes or Routes()
        x = self.normalise(images)
        routing = routes.decide(self.rules[0], self.router, x)
        return run_experts(routing, x, list(self.experts), routes.execution)


class LinearClassifier(Classifier):
    """One linear map and nothing to route."""

    def __init__(self, spec: ModelSpec, weight: Tensor, bias: Tensor) -> None:
        super().__init__(spec)
        self.linear = Linear(weight, bias)

    def forward(self, images: Tensor, routes: Routes | None = None) -> Tensor:
        return self.linear(self.normalise(images))  # type: ignore[no-any-return]


class PixelMoE(Classifier):
    """Every pixel is a token: its gate scores are (p, 0.5, 1 - p), expert e multiplies it by e + 1.

    Class 0 is the mean of what comes out, class 1 the threshold 0.9.
    """

    def __init__(self, spec: ModelSpec, top_k: int = 1, weighting: Weighting = "one") -> None:
        super().__init__(spec)
        self.rules = (RoutingRule("pixels", 3, top_k, weighting),)

    def forward(self, images: Tensor, routes: Routes | None = None) -> Tensor:
        routes = routes or Routes()
        tokens = images.flatten(1).reshape(-1, 1)
        routing = routes.decide(self.rules[0], self._gate, tokens)
        experts = [lambda x, e=e: x * (e + 1) for e in range(3)]
        out = run_experts(routing, tokens, experts, routes.execution)
        mean = out.view(len(images), -1).mean(dim=1)
        return torch.stack([mean, torch.full_like(mean, 0.9)], dim=1)

    @staticmethod
    def _gate(tokens: Tensor) -> Tensor:
        return torch.cat([tokens, torch.full_like(tokens, 0.5), 1 - tokens], dim=1)

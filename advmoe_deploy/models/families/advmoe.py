"""AdvMoE, and the dense networks it is measured against."""

import torch
from torch import Tensor, nn

from advmoe_deploy.models.backbones.build import build_backbone
from advmoe_deploy.models.backbones.layers import RoutedConv2d
from advmoe_deploy.models.backbones.router_resnet import RouterResNet
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.dispatch import Dispatch, run_experts
from advmoe_deploy.models.routing.routing import Routes, Routing, RoutingRule
from advmoe_deploy.specs import ModelSpec

ROUTER = "router"


class DenseClassifier(Classifier):
    """A dense network; one pathway of an AdvMoE is one of these too."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.backbone = build_backbone(spec, num_experts=1)

    def forward(self, images: Tensor, routes: Routes | None = None) -> Tensor:
        """Return logits [N, classes]; there is nothing to route."""
        logits: Tensor = self.backbone(self.normalise(images), None)
        return logits


class AdvMoE(Classifier):
    """AdvMoE: a router that looks at the image picks one expert index for all routed layers.

    In eval mode it equals ``num_experts`` dense networks (:meth:`pathway`) behind a router.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        dropped = spec.dropped_experts.get(ROUTER, ())
        self.rules = (RoutingRule(ROUTER, spec.num_experts, dropped=dropped),)
        self.router = RouterResNet(spec.in_channels, spec.router_width, spec.num_experts)
        self.backbone = build_backbone(spec, num_experts=spec.num_experts)

    def forward(self, images: Tensor, routes: Routes | None = None) -> Tensor:
        """Return logits [N, classes]."""
        routes = routes or Routes()
        x = self.normalise(images)
        routing = routes.decide(self.rules[0], self.router, x)
        logits: Tensor = self.backbone(x, Dispatch(routing, routes.execution))
        return logits

    def score(self, images: Tensor) -> Tensor:
        """Return the router's scores [N, E]."""
        scores: Tensor = self.router(self.normalise(images))
        return scores

    def route(self, images: Tensor) -> dict[str, Routing]:
        """Return the routing of the one router, for its cost alone."""
        routes = Routes()
        routes.decide(self.rules[0], self.router, self.normalise(images))
        return routes.taken

    def unrolled(self) -> nn.Module:
        """Return the pathways behind the router."""
        return _Pathways(self)

    @torch.no_grad()
    def adopt(self, pathway: DenseClassifier) -> None:
        """Make every pathway this one: its weights in each expert, its BatchNorms and its head."""
        state = pathway.backbone.state_dict()
        for name, module in self.backbone.named_modules():
            if isinstance(module, RoutedConv2d):
                bank = state[f"{name}.weight"]
                state[f"{name}.weight"] = bank.repeat(module.num_experts, 1, 1, 1)
        self.backbone.load_state_dict(state)

    def pathway(self, expert: int) -> DenseClassifier:
        """Return the dense network that images of ``expert`` meet, with copied weights."""
        dense = DenseClassifier(self.spec.pathway())
        state = {name: t.detach().clone() for name, t in self.backbone.state_dict().items()}
        for name, module in self.backbone.named_modules():
            if isinstance(module, RoutedConv2d):
                bank = state[f"{name}.weight"]
                state[f"{name}.weight"] = bank.chunk(module.num_experts)[expert].clone()
        dense.backbone.load_state_dict(state)
        return dense.to(next(self.parameters())).train(self.training)


class _Pathways(nn.Module):
    """An AdvMoE as what it equals in eval mode: whole dense networks and a router."""

    def __init__(self, model: AdvMoE) -> None:
        super().__init__()
        self.rule, self.normalise, self.router = model.rules[0], model.normalise, model.router
        self.pathways = nn.ModuleList(
            model.pathway(expert) for expert in range(model.spec.num_experts)
        )

    def forward(self, images: Tensor, routes: Routes) -> Tensor:
        """Return logits [N, classes]."""
        routing = routes.decide(self.rule, lambda x: self.router(self.normalise(x)), images)
        return run_experts(routing, images, [*self.pathways], routes.execution)

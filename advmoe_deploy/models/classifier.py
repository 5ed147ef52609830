"""Image classifiers: AdvMoE, and the dense networks it is measured against.

Both take float images [N, C, H, W] in [0, 1] and normalise them inside.
"""

import torch
from torch import Tensor, nn

from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.resnet import ResNet, RoutedConv2d, RouterResNet
from advmoe_deploy.models.routing import Dispatch, Execution, Routing, forced_route, route_top_1
from advmoe_deploy.specs import ModelSpec

_BLOCKS_PER_STAGE = {"resnet18": (2, 2, 2, 2)}


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


class DenseClassifier(nn.Module):
    """A dense network; one pathway of an MoE is one of these too."""

    def __init__(self, spec: ModelSpec, backbone: ResNet) -> None:
        super().__init__()
        self.spec = spec
        self.normalise = Normalise(spec.mean, spec.std)
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        logits: Tensor = self.backbone(self.normalise(images))
        return logits


class AdvMoE(nn.Module):
    """AdvMoE: a router that looks at the image picks one expert index for all routed layers.

    In eval mode it equals ``num_experts`` dense networks (:meth:`pathway`) behind a router.
    ``execution`` chooses between two ways to compute the same thing; see
    :class:`~advmoe_deploy.models.routing.Dispatch`.
    """

    def __init__(self, spec: ModelSpec, *, execution: Execution = "grouped") -> None:
        super().__init__()
        self.spec = spec
        self.execution: Execution = execution
        self.normalise = Normalise(spec.mean, spec.std)
        self.router = RouterResNet(spec.in_channels, spec.router_width, spec.num_experts)
        self.backbone = _advmoe_backbone(spec, spec.num_experts)

    def score(self, images: Tensor) -> Tensor:
        """Return the router's scores [N, E]."""
        scores: Tensor = self.router(self.normalise(images))
        return scores

    def route(self, images: Tensor) -> Routing:
        """Return the routing the model uses for ``images``."""
        return route_top_1(self.score(images))

    def forward(self, images: Tensor, routing: Routing | None = None) -> Tensor:
        """Return logits [N, classes], by the router's own route unless ``routing`` is given."""
        if routing is None:
            routing = self.route(images)
        logits: Tensor = self.backbone(self.normalise(images), Dispatch(routing, self.execution))
        return logits

    def forward_expert(self, images: Tensor, expert: int) -> Tensor:
        """Return logits [N, classes] of expert ``expert`` for every image."""
        ids_N = torch.full((len(images),), expert, dtype=torch.int64, device=images.device)
        return self.forward(images, forced_route(ids_N, self.spec.num_experts, like=images))

    def pathway(self, expert: int) -> DenseClassifier:
        """Return the dense network that images of ``expert`` meet, with copied weights."""
        backbone = _advmoe_backbone(self.spec, num_experts=1)
        state = {
            name: tensor.detach().clone() for name, tensor in self.backbone.state_dict().items()
        }
        for name, module in self.backbone.named_modules():
            if isinstance(module, RoutedConv2d):
                bank = state[f"{name}.weight"]
                state[f"{name}.weight"] = bank.chunk(module.num_experts)[expert].clone()
        backbone.load_state_dict(state)
        spec = self.spec.model_copy(update={"family": "dense", "num_experts": 1})
        return DenseClassifier(spec, backbone).train(self.training)


Classifier = AdvMoE | DenseClassifier


def build_model(spec: ModelSpec) -> Classifier:
    """Return a freshly initialised network for ``spec``; seed torch first for a known one."""
    if spec.family == "advmoe":
        return AdvMoE(spec)
    return DenseClassifier(spec, _backbone(spec, stem_width=_scaled(spec.width, spec)))


def as_advmoe(model: Classifier) -> AdvMoE:
    """Return ``model`` if it routes.

    Raises:
        UsageError: the model is dense.
    """
    if not isinstance(model, AdvMoE):
        raise UsageError("this model is dense and routes nothing; train an MoE recipe")
    return model


def _advmoe_backbone(spec: ModelSpec, num_experts: int) -> ResNet:
    return _backbone(spec, stem_width=spec.width, num_experts=num_experts)


def _backbone(spec: ModelSpec, *, stem_width: int, num_experts: int = 1) -> ResNet:
    return ResNet(
        blocks_per_stage=_BLOCKS_PER_STAGE[spec.backbone],
        stem_width=stem_width,
        stage_widths=tuple(_scaled(spec.width * 2**stage, spec) for stage in range(4)),
        in_channels=spec.in_channels,
        num_classes=spec.num_classes,
        num_experts=num_experts,
    )


def _scaled(channels: int, spec: ModelSpec) -> int:
    return int(channels * spec.ratio)

"""Multiply-accumulates per image, counted layer by layer: the router is never left out."""

import torch
from torch import Tensor, nn

from advmoe_deploy.models.advmoe import AdvMoE
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.resnet import RoutedConv2d
from advmoe_deploy.models.routing import Routes
from advmoe_deploy.reports import Macs
from advmoe_deploy.specs import ModelSpec


def count_macs(module: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return the multiply-accumulates of ``module`` for one image.

    Counted are convolutions and linear layers, each at its real output size; a bank of experts
    counts every expert that runs.
    """
    total = 0

    def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        positions = output.shape[2] * output.shape[3] if output.dim() == 4 else 1
        total += weight.numel() * positions

    counted = (nn.Conv2d, nn.Linear, RoutedConv2d)
    handles = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, counted)]
    was_training = module.training
    try:
        device = next(module.parameters()).device
        with torch.inference_mode():
            module.eval()(torch.zeros(1, *image_shape, device=device))
    finally:
        module.train(was_training)
        for handle in handles:
            handle.remove()
    return total


def macs_of(spec: ModelSpec) -> Macs:
    """Return the multiply-accumulates of the network ``spec`` describes and of its baselines."""
    model = build_model(spec)
    dense = count_macs(build_model(spec.dense()), spec.image_shape)
    s_dense = count_macs(build_model(spec.s_dense()), spec.image_shape)
    selected, router, unfused = _routed_macs(model)
    return Macs(
        selected=selected,
        router=router,
        executed=selected + router,
        unfused=unfused,
        dense=dense,
        s_dense=s_dense,
    )


class _Masked(nn.Module):
    """A model that computes every expert on every row."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, Routes(execution="masked"))  # type: ignore[no-any-return]


def _routed_macs(model: Classifier) -> tuple[int, int, int]:
    shape = model.spec.image_shape
    if not isinstance(model, AdvMoE):
        macs = count_macs(model, shape)
        return macs, 0, macs
    selected = count_macs(model.pathway(0), shape)
    router = count_macs(model.router, shape)
    return selected, router, count_macs(_Masked(model), shape)

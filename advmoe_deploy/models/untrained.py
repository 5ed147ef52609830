"""Random networks that behave like trained ones where speed and numerics are concerned.

A fresh network has BatchNorm statistics that fit nothing, so its activations grow from block to
block, and a router that sends every image to one expert. Latency can be measured before a model is
trained once both are set right.

Shapes: N images, C channels, H height, W width, E experts.
"""

import torch
from torch import Tensor, nn

from advmoe_deploy.models.advmoe import AdvMoE
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.specs import ModelSpec

_BALANCING_STEPS = 60


def untrained_model(spec: ModelSpec, images_NCHW: Tensor, *, seed: int = 0) -> Classifier:
    """Return a random network of ``spec``, in eval mode, fitted to images in [0, 1].

    BatchNorm holds the statistics of ``images_NCHW``, and the router's bias spreads them evenly
    over the experts.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build_model(spec).eval()
        if isinstance(model, AdvMoE):
            x_NCHW = model.normalise(images_NCHW)
            _fit_batchnorm(model.router, x_NCHW)
            model.router.fc.bias.add_(_balancing_bias(model.router(x_NCHW)))
        _fit_batchnorm(model, images_NCHW)
    return model


def _fit_batchnorm(module: nn.Module, x_NCHW: Tensor) -> None:
    """Set the running statistics of ``module`` to those of one forward pass over ``x_NCHW``."""
    layers = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.train()
        layer.momentum = 1.0
    module(x_NCHW)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.eval()
        layer.momentum = momentum


def _balancing_bias(scores_NE: Tensor) -> Tensor:
    """Return what to add to each expert's score so that all are chosen about equally often."""
    experts = scores_NE.shape[1]
    bias_E = -scores_NE.mean(dim=0)
    step = float(scores_NE.std())
    for _ in range(_BALANCING_STEPS):
        load_E = torch.bincount((scores_NE + bias_E).argmax(dim=1), minlength=experts)
        bias_E -= step * (load_E / len(scores_NE) - 1 / experts)
        step *= 0.93
    return bias_E

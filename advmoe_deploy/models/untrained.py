"""Random networks that behave like trained ones where speed and numerics are concerned.

A fresh network has BatchNorm statistics that fit nothing, so its activations grow from block to
block, and routers that send everything to one expert. Latency can be measured before a model is
trained once both are set right.

Shapes: N rows (images, or tokens), C channels, H height, W width, E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.routing.routing import Routes, Routing, RoutingRule
from advmoe_deploy.specs import ModelSpec

_BALANCING_STEPS = 60


def untrained_model(spec: ModelSpec, images_NCHW: Tensor, *, seed: int = 0) -> Classifier:
    """Return a random network of ``spec``, in eval mode, fitted to images in [0, 1].

    BatchNorm holds the statistics of ``images_NCHW``, and the bias of each gate that has one
    spreads them evenly over the experts. A linear gate without is blind to their mean instead.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build_model(spec).eval()
        _fit_batchnorm(model, images_NCHW)
        if model.rules:
            model(images_NCHW, _Balancing())
            _fit_batchnorm(model, images_NCHW)
    return model


def _fit_batchnorm(model: Classifier, images_NCHW: Tensor) -> None:
    """Set the running statistics of ``model`` to those of one forward pass."""
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.train()
        layer.momentum = 1.0
    # Masked, so that experts without an image see some too.
    model(images_NCHW, Routes(execution="masked"))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.eval()
        layer.momentum = momentum


class _Balancing(Routes):
    """Routes that balance each gate as it is met, so that later ones see balanced rows."""

    def decide(self, rule: RoutingRule, gate: Callable[[Tensor], Tensor], x: Tensor) -> Routing:
        """Balance the gate and return the routing after that."""
        bias_E = _last_bias(gate, rule.num_experts)
        if bias_E is not None:
            bias_E.add_(_balancing_bias(gate(x)))
        elif isinstance(gate, nn.Linear):
            mean_D = F.normalize(x.mean(dim=0), dim=0)
            gate.weight.sub_(torch.outer(gate.weight @ mean_D, mean_D))
        return super().decide(rule, gate, x)


def _last_bias(gate: Callable[[Tensor], Tensor], num_experts: int) -> Tensor | None:
    """Return the bias that is added to the scores of ``gate``."""
    modules = list(gate.modules()) if isinstance(gate, nn.Module) else []
    layers = [m for m in modules if isinstance(m, nn.Linear | nn.Conv2d)]
    bias = layers[-1].bias if layers else None
    return bias if bias is not None and len(bias) == num_experts else None


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

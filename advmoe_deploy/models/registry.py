"""Registry of families: the constructor of a network for a spec."""

from collections.abc import Callable

from advmoe_deploy.errors import UsageError
from advmoe_deploy.families import Family
from advmoe_deploy.models.backbones.vit import ViTMoE
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.families.advmoe import AdvMoE, DenseClassifier
from advmoe_deploy.models.families.dual import DualModel, ExpertNetworks
from advmoe_deploy.models.families.robust_experts import RobustExperts
from advmoe_deploy.specs import ModelSpec

_FAMILIES: dict[Family, Callable[[ModelSpec], Classifier]] = {
    "dense": DenseClassifier,
    "pathway": DenseClassifier,
    "advmoe": AdvMoE,
    "robust-experts": RobustExperts,
    "expert-networks": ExpertNetworks,
    "dual-model": DualModel,
    "vit-moe": ViTMoE,
}


def build_model(spec: ModelSpec) -> Classifier:
    """Return a freshly initialised network for ``spec``; seed torch first for a known one.

    Raises:
        UsageError: ``spec`` drops experts of a layer that the network does not route.
    """
    model = _FAMILIES[spec.family](spec)
    layers = [rule.layer for rule in model.rules]
    for layer in spec.dropped_experts:
        if layer not in layers:
            raise UsageError(
                f"dropped_experts names {layer}, which is no routed layer; those are "
                f"{', '.join(layers) or 'none'}"
            )
    return model

"""From a spec to a network: one constructor per family."""

from collections.abc import Callable

from advmoe_deploy.families import Family
from advmoe_deploy.models.advmoe import AdvMoE, DenseClassifier
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.dual import DualModel, ExpertNetworks
from advmoe_deploy.models.robust_experts import RobustExperts
from advmoe_deploy.models.vit import ViTMoE
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
    """Return a freshly initialised network for ``spec``; seed torch first for a known one."""
    return _FAMILIES[spec.family](spec)

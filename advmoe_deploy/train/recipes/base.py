"""How a recipe is made from another: a copy with a few fields changed, validated again."""

from advmoe_deploy.specs import ModelSpec
from advmoe_deploy.train.config import TrainConfig

# What only means something where a router learns.
_ROUTER_TERMS = {
    "balance_loss": None,
    "gate_noise": 0.0,
    "capacity_factor": None,
    "balanced_start": False,
    "class_routing_weight": 0.0,
    "track_router_robustness": False,
}


def variant(base: TrainConfig, *, name: str, **changes: object) -> TrainConfig:
    """Return ``base`` under another name with these fields changed."""
    return TrainConfig.model_validate({**base.model_dump(), "name": name, **changes})


def without_router(base: TrainConfig, *, name: str, model: ModelSpec) -> TrainConfig:
    """Return ``base`` for a dense ``model``: one joint step, no terms for a router."""
    return variant(base, name=name, method="joint", model=model, **_ROUTER_TERMS)

"""Recipes of AdvMoE's dissection, made of any recipe that trains router and experts.

A model trained on clean images, and one part of it trained adversarially by the loss of the model's
output alone, as the paper has it. Each run depends on the model that it begins with:
``advmoe train RECIPE --from RUN`` (see :mod:`~advmoe_deploy.analysis.several.roles`).
"""

from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.recipes.base import variant

# Of two steps in turn, or of experts that begin as one.
_ONE_STEP: dict[str, object] = {"random_routes": 0, "router_every": 1, "shared_start": 0}
# Terms for the router beside the loss of the output.
_LOSS_ALONE: dict[str, object] = {
    "class_routing_weight": 0,
    "route_stability": 0,
    "balance_loss": None,
    "balanced_start": False,
    "even_loads": False,
}


def on_clean_images(base: TrainConfig, *, name: str) -> TrainConfig:
    """Return ``base`` on clean images, all of it in one step, its router paid for even loads."""
    even = {} if base.balance_loss else {"balance_loss": "column-entropy", "balance_weight": 20}
    clean = {"class_routing_weight": 0, "route_stability": 0}
    return variant(base, name=name, method="joint", loss="standard", **_ONE_STEP, **clean, **even)


def only_router(base: TrainConfig, *, name: str) -> TrainConfig:
    """Return ``base`` with its router trained alone."""
    return variant(base, name=name, method="router-only", **_ONE_STEP, **_LOSS_ALONE)


def only_experts(base: TrainConfig, *, name: str) -> TrainConfig:
    """Return ``base`` with its experts trained alone."""
    return variant(base, name=name, method="experts-only", **_ONE_STEP, **_LOSS_ALONE)

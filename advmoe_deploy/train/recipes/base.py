"""Recipe type, and variants of recipes."""

from collections.abc import Callable
from dataclasses import dataclass

from advmoe_deploy.specs import ModelSpec
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.recipes.published import Published

# What only means something where a router learns.
_ROUTER_TERMS = {
    "balance_loss": None,
    "gate_noise": 0.0,
    "capacity_factor": None,
    "balanced_start": False,
    "class_routing_weight": 0.0,
    "track_router_robustness": False,
}


@dataclass(frozen=True)
class Recipe:
    """A function that returns one typed configuration, what its paper says and what we measured.

    ``measured`` names accuracies with their attack, or is empty: not measured.
    """

    make: Callable[[], TrainConfig]
    summary: str
    published: Published | None = None
    measured: str = ""

    @property
    def figures(self) -> str:
        """What the paper reports, if it does, and what we measured."""
        ours = f"measured: {self.measured}" if self.measured else "not measured"
        if (cell := self.published) is None:
            return ours
        return f"paper: {cell.robust_accuracy:g} % robust, {cell.clean_accuracy:g} % clean; {ours}"


def variant(base: TrainConfig, *, name: str, **changes: object) -> TrainConfig:
    """Return ``base`` under another name with these fields changed, validated again."""
    return TrainConfig.model_validate({**base.model_dump(), "name": name, **changes})


def without_router(base: TrainConfig, *, name: str, model: ModelSpec) -> TrainConfig:
    """Return ``base`` for a dense ``model``: one joint step, no terms for a router."""
    return variant(base, name=name, method="joint", model=model, **_ROUTER_TERMS)

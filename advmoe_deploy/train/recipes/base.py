"""Recipe type, and variants of recipes."""

from collections.abc import Callable
from dataclasses import dataclass

from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.fields import MAX_ROUTER_LR
from advmoe_deploy.train.recipes.published import Published


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
        """Figures that the paper reports, if it does, and those we measured."""
        ours = f"measured: {self.measured}" if self.measured else "not measured"
        if (cell := self.published) is None:
            return ours
        return f"paper: {cell.robust_accuracy:g} % robust, {cell.clean_accuracy:g} % clean; {ours}"


def variant(base: TrainConfig, *, name: str, **changes: object) -> TrainConfig:
    """Return ``base`` under another name with these fields changed, validated again."""
    return TrainConfig.model_validate({**base.model_dump(), "name": name, **changes})


def paper_objective(base: TrainConfig, *, name: str) -> TrainConfig:
    """Return AdvMoE's ``base`` with TRADES of the model's output as the one loss of both steps.

    That is what its paper writes. The router may then send all images to one expert.
    """
    nothing = {"balanced_start": False, "class_routing_weight": 0, "balance_loss": None}
    return variant(base, name=name, router_lr=MAX_ROUTER_LR, attack_per_step=True, **nothing)

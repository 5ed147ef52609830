"""Training configuration, one typed value, and its changes by ``key=value``."""

from collections.abc import Callable, Sequence

from pydantic import model_validator
from typing_extensions import Self

from advmoe_deploy.settings import checked_model, dotted_keys, put_setting
from advmoe_deploy.specs import ModelSpec
from advmoe_deploy.train.combinations import require_sense
from advmoe_deploy.train.fields import TrainFields


class TrainConfig(TrainFields):
    """Settings that make sense together; everything that decides a run, the data aside."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        require_sense(self)
        return self


# What only means something where a router learns.
_ROUTER_TERMS = (
    "balance_loss",
    "gate_noise",
    "capacity_factor",
    "balanced_start",
    "even_loads",
    "class_routing_weight",
    "router_every",
    "random_routes",
    "route_stability",
    "shared_start",
    "track_router_robustness",
)


# Returns a configuration with these settings, each ``key=value``, changed.
Configure = Callable[[Sequence[str]], TrainConfig]


def without_router(config: TrainConfig, *, name: str, model: ModelSpec) -> TrainConfig:
    """Return ``config`` for a dense ``model``: one joint step, no terms for a router."""
    fields = {**config.model_dump(exclude=set(_ROUTER_TERMS)), "name": name, "method": "joint"}
    return TrainConfig.model_validate({**fields, "model": model})


def apply_overrides(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """Return ``config`` with ``key=value`` settings applied and everything validated again.

    A key may be dotted (``model.num_experts=4``); a value is JSON, or a plain word. Another
    ``model.backbone`` brings its own width, unless ``model.width`` is set too.

    Raises:
        UsageError: a setting has no ``=``, an unknown key, or a value that makes no sense.
    """
    fields = config.model_dump()
    known = dotted_keys(fields)
    changed = {put_setting(fields, setting, known) for setting in settings}
    if fields["model"]["backbone"] != config.model.backbone and "model.width" not in changed:
        fields["model"]["width"] = None
    return checked_model(TrainConfig, fields)

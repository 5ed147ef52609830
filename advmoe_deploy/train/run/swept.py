"""Configurations of a sweep, known without loading PyTorch."""

from collections.abc import Sequence
from functools import partial

from advmoe_deploy.errors import UsageError
from advmoe_deploy.train.config import Configure, TrainConfig, apply_overrides, without_router


def sweep_configs(
    config: TrainConfig,
    key: str,
    values: Sequence[float],
    seeds: Sequence[int],
    configure: Configure | None = None,
) -> dict[tuple[float, int], TrainConfig]:
    """Return the configuration of each (value, seed); nonsense is refused here, all at once.

    ``configure`` changes settings of ``config``, by default those alone that it is told.

    Raises:
        UsageError: there is no value or no seed, one is given twice, ``key`` is the seed or no
            setting, or a value makes no sense for the recipe.
    """
    if not values or not seeds:
        raise UsageError("a sweep needs at least one value and one seed")
    if key == "seed":
        raise UsageError("a sweep over seed is no sweep; name its seeds by --seeds")
    for what, given in (("values", values), ("seeds", seeds)):
        if len(set(given)) < len(given):
            raise UsageError(
                f"a {what[:-1]} is twice among the {what} {', '.join(map(str, given))}"
            )
    change = configure or partial(apply_overrides, config)
    return {
        (value, seed): _with(config, change, key, value, seed) for value in values for seed in seeds
    }


def _with(
    config: TrainConfig, configure: Configure, key: str, value: float, seed: int
) -> TrainConfig:
    """Return ``config`` at one value; an AdvMoE of one expert is that pathway, without a router."""
    if (key, value, config.model.family) == ("model.num_experts", 1, "advmoe"):
        alone = without_router(config, name=config.name, model=config.model.pathway())
        return apply_overrides(alone, [f"seed={seed}"])
    return configure([f"{key}={value_text(value)}", f"seed={seed}"])


def value_text(value: float) -> str:
    """Return ``value`` as a setting says it, whole numbers without a point and nothing rounded."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))

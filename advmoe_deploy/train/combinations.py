"""Combinations of a run's settings that make sense."""

from collections.abc import Iterable

from advmoe_deploy.families import IMAGE_ROUTED, Family
from advmoe_deploy.train.fields import Loss, Method, TrainFields

_ROUTED: tuple[Family, ...] = (
    "advmoe",
    "robust-experts",
    "expert-networks",
    "dual-model",
    "vit-moe",
)
FAMILIES_OF_METHOD: dict[Method, tuple[Family, ...]] = {
    "advmoe": ("advmoe",),
    "advmoe-released": ("advmoe",),
    "router-only": _ROUTED,
    "experts-only": _ROUTED,
    "joint": ("dense", "pathway", *_ROUTED),
    "sparse": ("dense",),
    "rt-er": ("expert-networks",),
    "jtdmoe": ("dual-model",),
}
# Methods whose own formula says which loss it is.
_ONE_LOSS: dict[Method, Loss] = {
    "advmoe-released": "trades",
    "rt-er": "pgd-at",
    "jtdmoe": "pgd-at",
}


# The stages of method ``sparse`` and the share of the epochs that each takes, as HYDRA's 100, 20
# and 100 epochs (Sehwag et al., NeurIPS 2020).
SPARSE_STAGES = {"dense": 5 / 11, "scores": 1 / 11, "fine-tune": 5 / 11}


# Terms of a router's loss, and what needs the one router of AdvMoE.
_OF_ADVMOE = ("balanced_start", "even_loads", "class_routing_weight", "route_stability")
_LEARNED = ("balance_loss", *_OF_ADVMOE)


def require_sense(config: TrainFields) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ValueError: two of them do; the line names them and the way out.
    """
    for check in (_method, _routes, _terms, _capacity, _fixed_gate, _batches, _sparse, _start):
        check(config)


def _refuse(config: TrainFields, names: Iterable[str], why: str) -> None:
    """Raise for the first of these settings that is not at its default."""
    fields = type(config).model_fields
    for name in names:
        if getattr(config, name) != fields[name].default:
            raise ValueError(f"{name} {why}")


def _method(config: TrainFields) -> None:
    families = FAMILIES_OF_METHOD[config.method]
    if config.model.family not in families:
        raise ValueError(
            f"method {config.method} trains family {' or '.join(families)}, not "
            f"{config.model.family}; change method or model.family"
        )
    loss = _ONE_LOSS.get(config.method, config.loss)
    if config.loss != loss:
        raise ValueError(f"method {config.method} is defined with loss {loss}, not {config.loss}")


def _routes(config: TrainFields) -> None:
    family = config.model.family
    if config.model.dropped_experts:
        raise ValueError(
            "model.dropped_experts says what an export left out; train all experts, and export "
            "them with --prune-unused"
        )
    if family in ("dense", "pathway"):
        routed = ("balance_loss", "gate_noise", "capacity_factor", "track_router_robustness")
        _refuse(config, routed, f"needs routes, and family {family} has none")
    if family != "advmoe":
        _refuse(config, (*_OF_ADVMOE, "shared_start"), f"is for family advmoe, not {family}")
    if config.shared_epochs:
        alone = ("track_router_robustness",)
        _refuse(config, alone, "needs a router in every epoch; use shared_start=0")


def _terms(config: TrainFields) -> None:
    method = config.method
    if method == "advmoe-released":
        _refuse(config, _LEARNED, f"is no part of method {method}; use advmoe")
    if method == "experts-only":
        _refuse(config, _LEARNED, f"needs a router that learns, not method {method}")
    if method != "advmoe":
        steps = ("random_routes", "router_every")
        _refuse(config, steps, f"is for the two steps of method advmoe, not {method}")
    if config.random_routes and not config.attack_per_step:
        raise ValueError("random_routes needs examples of its own; use attack_per_step=true")


def _fixed_gate(config: TrainFields) -> None:
    gate = config.model.expert_layers.gate if config.model.expert_layers else ""
    if not gate.startswith("fixed"):
        return
    if config.method == "router-only":
        raise ValueError(f"method router-only cannot train gate {gate}, which never learns")
    if config.balance_loss is not None:
        raise ValueError(f"balance_loss cannot teach gate {gate}, which never learns")


def _capacity(config: TrainFields) -> None:
    factor, family = config.capacity_factor, config.model.family
    if factor is None:
        return
    if config.capacity_overflow == "drop" and family in IMAGE_ROUTED:
        raise ValueError(
            f"capacity_overflow=drop leaves images of family {family} without an answer; "
            "use reassign"
        )
    if factor < 1 and config.capacity_overflow == "reassign":
        raise ValueError(
            f"capacity_factor={factor} leaves rows without an expert; use at least 1, or "
            "capacity_overflow=drop"
        )


def _batches(config: TrainFields) -> None:
    if config.batch_size < 2 * config.accumulate:
        raise ValueError(
            f"batch_size={config.batch_size} leaves under two images for each of "
            f"accumulate={config.accumulate} parts; lower accumulate"
        )


def _sparse(config: TrainFields) -> None:
    if config.method != "sparse":
        _refuse(config, ("sparse_density",), f"goes with method sparse, not {config.method}")
        return
    if config.epochs < len(SPARSE_STAGES):
        raise ValueError(f"method sparse needs at least {len(SPARSE_STAGES)} epochs")
    if config.sparse_density is None and config.sparse_ratio >= config.model.ratio:
        raise ValueError(
            f"sparse_ratio={config.sparse_ratio} is no smaller than model.ratio="
            f"{config.model.ratio}; there is nothing to prune"
        )


def _start(config: TrainFields) -> None:
    if config.method == "router-only" and config.start is not None and config.start.new_head:
        raise ValueError(
            f"method router-only leaves the last layer alone, and {config.start.source} has other "
            "classes; begin with a model of these classes, or train all of it by method joint"
        )

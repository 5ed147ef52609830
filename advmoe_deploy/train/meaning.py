"""Settings of a run for people: each with its value, its default, what it may be, its meaning."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from advmoe_deploy.train.fields import TrainFields

GROUPS: dict[str, tuple[str, ...]] = {
    "network": ("model",),
    "threat": ("threat",),
    "data": ("name", "data", "train_images", "test_images", "crop_padding", "flip"),
    "run": ("epochs", "batch_size", "accumulate", "seed", "precision", "channels_last"),
    "optimizer": (
        "lr",
        "router_lr",
        "router_grad_clip",
        "momentum",
        "weight_decay",
        "schedule",
        "ema_decay",
    ),
    "method and loss": (
        "method",
        "loss",
        "beta",
        "nfgsm_noise",
        "free_repeats",
        "sparse_ratio",
        "sparse_density",
    ),
    "attack inside training": (
        "attack_steps",
        "attack_step_size",
        "attack_noise",
        "attack_target",
        "attack_per_step",
        "attack_in_eval_mode",
    ),
    "router": (
        "shared_start",
        "router_every",
        "random_routes",
        "route_stability",
        "balance_loss",
        "balance_weight",
        "balanced_start",
        "even_loads",
        "class_routing_weight",
        "gate_noise",
        "capacity_factor",
        "capacity_overflow",
    ),
    "measurement": (
        "evaluate_every",
        "holdout_attack_steps",
        "test_attack_steps",
        "test_attack_step_size",
        "track_router_robustness",
    ),
}
_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Setting:
    """One setting as ``--set KEY=VALUE`` takes it.

    ``value`` is that of a configuration, ``default`` what holds where a recipe says nothing;
    ``is_required`` says that each recipe must. ``allowed`` is in words, empty for anything of its
    kind.
    """

    key: str
    group: str
    value: Any
    default: Any
    is_required: bool
    allowed: str
    meaning: str


def settings_of(config: TrainFields | None = None) -> list[Setting]:
    """Return every setting, group by group, with the values of ``config``, by default none."""
    fields = config.model_dump(mode="json") if config is not None else {}
    return [
        setting
        for group, names in GROUPS.items()
        for name in names
        for setting in _below(TrainFields, name, fields, group, "")
    ]


def _below(
    owner: type[BaseModel], name: str, values: dict[str, Any], group: str, prefix: str
) -> Iterator[Setting]:
    """Yield a setting of ``owner``, or where it has parts, those."""
    field, value = owner.model_fields[name], values.get(name)
    parts = _parts(field)
    if parts is None or (values and value is None):
        yield _setting(owner, name, field, value, group, prefix)
        return
    for part in parts.model_fields:
        yield from _below(parts, part, value or {}, group, f"{prefix}{name}.")


def _setting(
    owner: type[BaseModel], name: str, field: FieldInfo, value: Any, group: str, prefix: str
) -> Setting:
    default = field.get_default(call_default_factory=True)
    required = default is PydanticUndefined
    return Setting(
        key=prefix + name,
        group=group,
        value=value,
        default=None if required else default,
        is_required=required,
        allowed=_allowed(field),
        meaning=meanings(owner)[name],
    )


@cache
def meanings(owner: type) -> dict[str, str]:
    """Return the docstring below each field of a class, in one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _parts(field: FieldInfo) -> type[BaseModel] | None:
    """Return the class of the settings below one, if it has any."""
    kinds = _kinds(field.annotation)
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _allowed(field: FieldInfo) -> str:
    kinds = _kinds(field.annotation)
    words = [str(v) for k in kinds if get_origin(k) is Literal for v in get_args(k)]
    words += ["true", "false"] if bool in kinds else []
    words += ["null"] if NoneType in kinds else []
    limits = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in _LIMITS.items()
        if hasattr(limit, name)
    ]
    return ", ".join([*limits, *words])

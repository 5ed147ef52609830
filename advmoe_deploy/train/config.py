"""The one typed value that says how a model is trained, and how a flag changes it."""

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from advmoe_deploy.errors import UsageError, unknown_name
from advmoe_deploy.specs import Frozen, ModelSpec, ThreatModel, one_line

Method = Literal["advmoe", "at-moe", "at-dense"]
MAX_ROUTER_LR = 0.01


class TrainConfig(Frozen):
    """Everything that decides a run, the data aside: the same value gives the same weights.

    ``method`` is ``advmoe`` (router and expert steps alternate), ``at-moe`` (one joint step) or
    ``at-dense``; all minimise TRADES, CE(f(x), y) + ``beta`` * KL(f(x) || f(x')).

    ``router_lr`` is a peak like ``lr``, and bounded: at 0.1 the scores of AdvMoE's router explode
    and all images flip between experts. ``router_grad_clip`` bounds the norm of its gradient.
    ``attack_target`` says whether the gradient of the attack inside training enters the router.
    ``attack_per_step`` finds new examples for the expert step, as the paper does; without it the
    router's are used again, for about a third less work. ``attack_in_eval_mode`` attacks the
    model with its running statistics instead of the batch's.
    ``ema_decay`` averages the weights that are evaluated and kept.

    Two remedies against a router that sends everything to one expert are not in AdvMoE's paper,
    and off in its recipe. ``balanced_start`` sets the router's last bias so that the mean scores
    of the first batch are equal. ``class_routing_weight`` adds to the router's loss minus the
    mutual information of class and expert, on clean images and on those that attack the router:
    all images of a class to one expert, and as many to each. (The paper's released code prescribes
    label modulo E instead; here the router chooses.) On the digits the paper's objective alone
    collapses within six epochs, and balancing the load alone splits each class at random, which
    leaves each expert half the data of every class.
    """

    name: str
    data: str
    model: ModelSpec
    threat: ThreatModel
    method: Method
    beta: float = Field(6.0, ge=0)
    epochs: int = Field(100, ge=1)
    batch_size: int = Field(128, ge=2)
    lr: float = Field(0.1, gt=0)
    router_lr: float = Field(MAX_ROUTER_LR, gt=0, le=MAX_ROUTER_LR)
    router_grad_clip: float = Field(1.0, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    schedule: Literal["cosine", "one-cycle"] = "cosine"
    attack_steps: int = Field(2, ge=1)
    attack_step_size: float = Field(5 / 255, gt=0)
    attack_noise: float = Field(0.001, ge=0)
    attack_target: Literal["model", "straight-through"] = "straight-through"
    attack_per_step: bool = True
    attack_in_eval_mode: bool = True
    balanced_start: bool = False
    class_routing_weight: float = Field(0.0, ge=0)
    crop_padding: int = Field(0, ge=0)
    flip: bool = False
    ema_decay: float | None = Field(None, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    evaluate_every: int = Field(1, ge=1)
    holdout_attack_steps: int = Field(10, ge=1)
    test_attack_steps: int = Field(50, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        family = "dense" if self.method == "at-dense" else "advmoe"
        if self.model.family != family:
            raise ValueError(
                f"method {self.method} trains family {family}, not {self.model.family}; "
                "change method or model.family"
            )
        return self


def apply_overrides(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """Return ``config`` with ``key=value`` settings applied and everything validated again.

    A key may be dotted (``model.num_experts=4``); a value is JSON, or a plain word.

    Raises:
        UsageError: a setting has no ``=``, an unknown key, or a value that makes no sense.
    """
    fields = config.model_dump()
    known = _flat_keys(fields)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"'{setting}' is no setting; write key=value, such as epochs=3")
        if key not in known:
            raise unknown_name("setting", key, known)
        *path, last = key.split(".")
        target = fields
        for part in path:
            target = target[part]
        target[last] = _value(text)
    try:
        return TrainConfig.model_validate(fields)
    except ValidationError as error:
        raise UsageError(one_line(error)) from None


def _flat_keys(fields: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for name, value in fields.items():
        if isinstance(value, dict):
            keys += _flat_keys(value, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text

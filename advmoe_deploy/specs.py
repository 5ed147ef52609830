"""What a model is, what it is up against, at which batch sizes it runs: frozen, validated."""

import math
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from typing_extensions import Self

from advmoe_deploy.errors import UsageError

Family = Literal["advmoe", "dense"]
Backbone = Literal["resnet18"]
Precision = Literal["fp32"]
AttackTarget = Literal["model", "straight-through", "pathway"]


class Frozen(BaseModel):
    """A value that never changes and refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(Frozen):
    """Everything needed to build the network, weights aside.

    ``ratio`` scales the channels of every routed convolution (AdvMoE), or of every layer, the stem
    included (dense: ``ratio < 1`` is the papers' S-Dense). ``mean`` and ``std`` are per channel, in
    [0, 1] pixels, and are part of the model.
    """

    family: Family
    backbone: Backbone = "resnet18"
    num_classes: int = Field(10, ge=2)
    num_experts: int = Field(1, ge=1, le=64)
    top_k: int = Field(1, ge=1)
    ratio: float = Field(1.0, gt=0, le=1)
    width: int = Field(64, ge=1)
    router_width: int = Field(16, ge=1)
    in_channels: int = Field(3, ge=1)
    image_size: int = Field(32, ge=4, le=64)
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} exceeds num_experts={self.num_experts}; "
                "lower top_k or add experts"
            )
        if self.family == "advmoe" and (self.num_experts < 2 or self.top_k != 1):
            raise ValueError(
                f"advmoe routes each image to one of at least two experts, not "
                f"top_k={self.top_k} of num_experts={self.num_experts}"
            )
        if self.family == "dense" and self.num_experts != 1:
            raise ValueError(f"a dense model has num_experts=1, not {self.num_experts}")
        if int(self.width * self.ratio) < 1:
            raise ValueError(
                f"ratio={self.ratio} leaves no channel of width={self.width}; "
                f"the least is {1 / self.width:.3g}"
            )
        if not len(self.mean) == len(self.std) == self.in_channels:
            raise ValueError(
                f"mean and std need in_channels={self.in_channels} values, "
                f"not {len(self.mean)} and {len(self.std)}"
            )
        if not all(math.isfinite(v) for v in self.mean + self.std) or min(self.std) <= 0:
            raise ValueError("mean and std must be finite and std positive")
        return self

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of one image."""
        return (self.in_channels, self.image_size, self.image_size)

    def dense(self) -> "ModelSpec":
        """Return the dense network of full width that the MoE is measured against."""
        return self.model_copy(update={"family": "dense", "num_experts": 1, "ratio": 1.0})

    def s_dense(self) -> "ModelSpec":
        """Return the small dense network: this ratio in every layer, no experts."""
        return self.model_copy(update={"family": "dense", "num_experts": 1})


def _one_per_class(names: tuple[str, ...], fields: ValidationInfo) -> tuple[str, ...]:
    spec = fields.data.get("model")
    if isinstance(spec, ModelSpec) and len(names) != spec.num_classes:
        raise ValueError(f"{len(names)} names for num_classes={spec.num_classes}; give one each")
    return names


# A field after ``model: ModelSpec``, whose classes it names.
ClassNames = Annotated[tuple[str, ...], AfterValidator(_one_per_class)]


class ThreatModel(Frozen):
    """What the attacker may do: ``epsilon`` is in [0, 1] pixels."""

    norm: Literal["linf"] = "linf"
    epsilon: float = Field(gt=0, le=1)


class AttackSpec(Frozen):
    """One attack. ``step_size`` is in [0, 1] pixels; ``None`` means 2.5 * epsilon / steps.

    ``steps`` are Square's queries; AutoAttack has its own, and its own way into a router.
    """

    name: Literal["pgd", "square", "autoattack"]
    target: AttackTarget = "model"
    steps: int = Field(50, ge=1)
    step_size: float | None = Field(None, gt=0)
    restarts: int = Field(1, ge=1)
    seed: int = 0


class BatchProfile(Frozen):
    """Batch sizes an engine is built for."""

    min: int = Field(1, ge=1)
    opt: int = Field(64, ge=1)
    max: int = Field(1024, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"batch sizes must grow: min={self.min} opt={self.opt} max={self.max}")
        return self


def one_line(error: ValidationError) -> str:
    """Return what ``error`` says, in one line that names each field."""
    parts = []
    for item in error.errors(include_url=False):
        field = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        parts.append(f"{field}: {message}" if field else message)
    return "; ".join(parts)


def build_spec(**fields: object) -> ModelSpec:
    """Return a :class:`ModelSpec`; nonsense raises :class:`UsageError` in one line."""
    try:
        return ModelSpec.model_validate(fields)
    except ValidationError as error:
        raise UsageError(one_line(error)) from None

"""Specs of models, threats and attacks: frozen values, validated."""

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from typing_extensions import Self

from advmoe_deploy.errors import UsageError, one_line
from advmoe_deploy.families import (
    BACKBONES,
    BASE_WIDTH,
    IMAGE_ROUTED,
    Backbone,
    ExpertKind,
    Family,
    expert_modules,
)
from advmoe_deploy.settings import number_of

Gate = Literal["gap-fc", "conv-gap", "conv3-gap", "double-conv", "fixed-gap-fc", "fixed-conv-gap"]
Weighting = Literal["one", "probability", "renormalised"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
# What is not quantised is computed in.
ComputeDtype = Literal["fp32", "fp16", "bf16"]
Backend = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
AttackTarget = Literal[
    "model",
    "straight-through",
    "auxiliary",
    "soft",
    "pathway",
    "weakest",
    "router",
    "experts",
]
AttackLoss = Literal["cross-entropy", "margin"]


class Frozen(BaseModel):
    """A value that never changes and refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ExpertLayers(Frozen):
    """Layers with experts of a ResNet of Robust Experts (arXiv 2509.05086), and their gate."""

    kind: ExpertKind
    """Kind of an expert: a whole residual block, or one convolution."""
    layers: tuple[str, ...] = Field(("layer4",), min_length=1)
    """Prefixes of module names: layer4 (the stage, 1x1 convolutions included), layer4.1 (a block),
    layer4.1.conv2 (one convolution, kind conv only)."""
    gate: Gate = "gap-fc"
    """Form of the gate, which makes scores of experts of its input."""


class VisionTransformer(Frozen):
    """A small ViT."""

    patch_size: int = Field(4, ge=1)
    """Pixels a side of what becomes a token."""
    depth: int = Field(6, ge=1)
    """Blocks."""
    heads: int = Field(3, ge=1)
    """Heads of the attention."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Width of the MLPs, relative to the embedding's."""
    moe_blocks: tuple[int, ...] = ()
    """Blocks whose MLP is a bank of experts (V-MoE)."""


class ModelSpec(Frozen):
    """Everything needed to build the network, weights aside."""

    family: Family
    """Architecture: the part that is routed, and the form of an expert."""
    backbone: Backbone = "resnet18"
    """Network that experts are parts or copies of."""
    num_classes: int = Field(10, ge=2)
    """Classes of the data."""
    num_experts: int = Field(1, ge=1, le=64)
    """Experts of each routed layer; 1 of a dense network."""
    top_k: int = Field(1, ge=1)
    """Experts that a row is sent to."""
    weighting: Weighting = "one"
    """Weights of the answers of a row's experts."""
    ratio: float = Field(1.0, gt=0, le=1)
    """Share of the channels that every routed convolution keeps (AdvMoE), or every layer, the stem
    included (dense: below 1 it is the papers' S-Dense); of a ViT, of the MLPs alone."""
    width: int = Field(64, ge=1)
    """Base width of the backbone before ratio, by default the paper's; of a ViT, the embedding."""
    router_width: int = Field(16, ge=1)
    """Base width of AdvMoE's router."""
    in_channels: int = Field(3, ge=1)
    """1 for grey images, 3 for colour."""
    image_size: int = Field(32, ge=4, le=512)
    """Pixels a side that images are scaled to."""
    stem: Literal["small", "imagenet"] = "small"
    """First layer: small (3x3, for images up to 64 pixels) or imagenet (7x7 with stride 2, then
    max-pooling)."""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Mean of each channel in [0, 1] pixels; part of the model."""
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Deviation of each channel in [0, 1] pixels; part of the model."""
    expert_layers: ExpertLayers | None = None
    """Where a ResNet of Robust Experts holds experts."""
    transformer: VisionTransformer | None = None
    """Sizes of a ViT."""
    alpha: float | None = Field(None, ge=0, le=1)
    """Share of the robust model in a dual model."""
    dropped_experts: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """By routed layer, experts that no row is sent to, whatever their scores: what an export leaves
    out."""

    @model_validator(mode="before")
    @classmethod
    def _default_width(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("width") is None:
            backbone = fields.get("backbone", "resnet18")
            return {**fields, "width": BASE_WIDTH.get(backbone, 64)}
        return fields

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_routing()
        self._check_parts()
        self._check_channels()
        self._check_dropped()
        return self

    def _check_routing(self) -> None:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} exceeds num_experts={self.num_experts}; "
                "lower top_k or add experts"
            )
        if self.family in ("dense", "pathway"):
            if self.num_experts != 1:
                raise ValueError(f"a dense model has num_experts=1, not {self.num_experts}")
            return
        if self.num_experts < 2:
            raise ValueError(f"{self.family} needs at least two experts, not {self.num_experts}")
        if self.family in IMAGE_ROUTED and self.top_k != 1:
            raise ValueError(
                f"{self.family} routes each image to one of at least two experts, not "
                f"top_k={self.top_k} of num_experts={self.num_experts}"
            )
        if self.weighting == "one" and self.top_k != 1:
            raise ValueError(
                f"weighting 'one' is for top_k=1, not {self.top_k}; use renormalised or probability"
            )

    def _check_parts(self) -> None:
        if self.family == "robust-experts" and self.backbone == "vit":
            raise ValueError("a ViT has no convolutions to turn into experts; use family vit-moe")
        if self.stem == "imagenet" and self.backbone in ("vgg16-bn", "vit"):
            raise ValueError(f"{self.backbone} has no imagenet stem; leave stem=small")
        allowed = BACKBONES.get(self.family)
        if allowed and self.backbone not in allowed:
            raise ValueError(
                f"{self.family} cannot be built on {self.backbone}; use {', '.join(allowed)}"
            )
        if (self.expert_layers is not None) != (self.family == "robust-experts"):
            raise ValueError("expert_layers go with family robust-experts, and with no other")
        if (self.transformer is not None) != (self.backbone == "vit"):
            raise ValueError("transformer goes with backbone vit, and with no other")
        if (self.alpha is not None) != (self.family == "dual-model"):
            raise ValueError("alpha goes with family dual-model, and with no other")
        if self.transformer is not None:
            self._check_transformer(self.transformer)
        if self.expert_layers is not None:
            self._check_expert_layers(self.expert_layers)

    def _check_expert_layers(self, layers: ExpertLayers) -> None:
        if self.ratio != 1:
            raise ValueError(f"experts of {self.family} have full width: ratio=1, not {self.ratio}")
        first = expert_modules(self.backbone, layers.kind, layers.layers)[0]
        channels = self.width * 2 ** max(int(first[len("layer")]) - 2, 0)
        if layers.gate == "fixed-conv-gap" and self.num_experts > channels:
            raise ValueError(
                f"gate fixed-conv-gap has a channel score each of num_experts={self.num_experts} "
                f"experts, and {first} may see {channels}; lower num_experts or raise width"
            )

    def _check_transformer(self, transformer: VisionTransformer) -> None:
        if self.image_size % transformer.patch_size:
            raise ValueError(
                f"patch_size={transformer.patch_size} does not divide image_size={self.image_size}"
            )
        if self.width % transformer.heads:
            raise ValueError(f"heads={transformer.heads} does not divide width={self.width}")
        blocks = transformer.moe_blocks
        if bool(blocks) != (self.family == "vit-moe"):
            raise ValueError("moe_blocks go with family vit-moe, and with no other")
        if len(set(blocks)) != len(blocks) or any(
            not 0 <= block < transformer.depth for block in blocks
        ):
            raise ValueError(f"moe_blocks={blocks} are not blocks of depth={transformer.depth}")

    def _check_channels(self) -> None:
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

    def _check_dropped(self) -> None:
        for layer, dropped in self.dropped_experts.items():
            if list(dropped) != sorted({*dropped} & {*range(self.num_experts)}):
                raise ValueError(
                    f"dropped_experts of {layer} are ids below num_experts={self.num_experts} in "
                    f"ascending order, not {dropped}"
                )
            left = self.num_experts - len(dropped)
            if left < self.top_k:
                raise ValueError(
                    f"dropped_experts of {layer} leave {left} of num_experts={self.num_experts}, "
                    f"fewer than top_k={self.top_k}; drop fewer"
                )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of one image."""
        return (self.in_channels, self.image_size, self.image_size)

    def dense(self) -> "ModelSpec":
        """Return the dense network of full width that the MoE is measured against."""
        return self._without_experts(ratio=1.0)

    def s_dense(self) -> "ModelSpec":
        """Return the small dense network: this ratio in every layer, no experts."""
        return self._without_experts()

    def pathway(self) -> "ModelSpec":
        """Return the dense network that images of one expert of an AdvMoE meet."""
        changes = {"family": "pathway", "num_experts": 1, "dropped_experts": {}}
        return self.model_copy(update=changes)

    def _without_experts(self, **changes: object) -> "ModelSpec":
        transformer = self.transformer
        if transformer is not None:
            transformer = transformer.model_copy(update={"moe_blocks": ()})
        dense = {
            "family": "dense",
            "num_experts": 1,
            "top_k": 1,
            "weighting": "one",
            "expert_layers": None,
            "transformer": transformer,
            "alpha": None,
            "dropped_experts": {},
        }
        return self.model_copy(update={**dense, **changes})


def _one_per_class(names: tuple[str, ...], fields: ValidationInfo) -> tuple[str, ...]:
    spec = fields.data.get("model")
    if isinstance(spec, ModelSpec) and len(names) != spec.num_classes:
        raise ValueError(f"{len(names)} names for num_classes={spec.num_classes}; give one each")
    return names


# A field after ``model: ModelSpec``, whose classes it names.
ClassNames = Annotated[tuple[str, ...], AfterValidator(_one_per_class)]


class Fingerprint(Frozen):
    """Fingerprint of a data set: two SHA-256 sums over its pixels.

    ``images`` tells which images are to train and which to test on, and which of them are of one
    class; it is the same for every layout, order and spelling of the classes. ``dealt`` tells the
    order in which they are dealt into training, hold-out and test images, with their labels: what
    a run needs to go on as it began.
    """

    images: str
    dealt: str


# A number, or a fraction in words: "8/255".
Fraction = Annotated[float, BeforeValidator(lambda v: number_of(v) if isinstance(v, str) else v)]


class ThreatModel(Frozen):
    """Threat model: the norm and the radius of the attacker."""

    norm: Literal["linf"] = "linf"
    """Norm of the perturbation."""
    epsilon: Fraction = Field(gt=0, le=1)
    """Radius in [0, 1] pixels, such as 8/255."""


class AttackSpec(Frozen):
    """One attack. ``step_size`` is in [0, 1] pixels; ``None`` means 2.5 * epsilon / steps.

    ``steps`` are the squares of Square, the queries of RayS, which restarts by itself; AutoAttack's
    are its own, as is its way into a router. APGD and FAB set their step size. ``classes`` says at
    how many likeliest wrong classes a targeted attack aims in turn: -t at nine, PGD at none.

    The rest is PGD's. Without ``random_start`` the search begins at the image. ``momentum`` is the
    share of the last direction that is kept; with ``decay`` the step falls from epsilon to nearly
    nothing. ``temperature``, of target soft, is a share of the median gap between routes.
    """

    name: Literal["pgd", "apgd", "apgd-t", "fab-t", "square", "rays", "autoattack"]
    target: AttackTarget = "model"
    steps: int = Field(50, ge=1)
    step_size: float | None = Field(None, gt=0)
    restarts: int = Field(1, ge=1)
    random_start: bool = True
    seed: int = 0
    loss: AttackLoss = "cross-entropy"
    classes: int = Field(0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    decay: bool = False
    temperature: float = Field(0.5, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.restarts > 1 and (self.name == "rays" or not self.random_start):
            how = "of rays, which has its own," if self.name == "rays" else "without random_start"
            raise ValueError(f"restarts={self.restarts} {how} would all be the same")
        if self.decay and self.step_size is not None:
            raise ValueError("with decay the step falls from epsilon; leave step_size out")
        return self


def build_spec(**fields: object) -> ModelSpec:
    """Return a :class:`ModelSpec`; nonsense raises :class:`UsageError` in one line."""
    try:
        return ModelSpec.model_validate(fields)
    except ValidationError as error:
        raise UsageError(one_line(error)) from None

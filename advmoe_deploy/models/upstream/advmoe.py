"""Checkpoints of AdvMoE's released code (arXiv 2308.10110), read into ours.

Names and shapes tell the backbone, its stem, experts, classes and ratio. They cannot tell the size
of the images (but for a VGG), the normalisation, and, where the stem is scaled too, ``width`` and
``ratio`` apart: those are the paper's width and what follows from it unless said. The file repeats
the router under every routed layer; we keep one.
"""

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from advmoe_deploy.errors import CheckpointError, unknown_name
from advmoe_deploy.families import BASE_WIDTH
from advmoe_deploy.models.backbones.build import RESNETS, WIDENING, scaled
from advmoe_deploy.models.backbones.resnet import Bottleneck
from advmoe_deploy.models.backbones.vgg import VGG16_STAGES
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.upstream.shapes import shape_of
from advmoe_deploy.models.upstream.wrappers import Signature, StateDict
from advmoe_deploy.specs import ModelSpec, build_spec

# What the file cannot tell.
OVERRIDES = ("image_size", "mean", "std", "width", "ratio")
# What tells where the network is: a ResNet, a wide one, a VGG. The router is a ResNet as well.
SIGNATURE = Signature(
    (("layer1.0.conv1.weight",), ("block1.layer.0.conv1.weight",), ("features.0.weight",)),
    parts=frozenset({"router"}),
    beside="router",
)

# Channels at full width, and how many of them the network has.
Widths = Sequence[tuple[int, int]]


def convert(
    state: Mapping[str, Tensor], overrides: Mapping[str, object]
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Return the spec of a released network and its weights under our names.

    Args:
        state: the tensors under ``state_dict``, and those under ``router`` as ``router.*``.
        overrides: fields of the spec that the file does not tell, see :data:`OVERRIDES`.

    Raises:
        CheckpointError: this is no AdvMoE, a tensor is missing, odd or of another shape.
        UsageError: an override is unknown or makes no sense.
    """
    for name in overrides.keys() - set(OVERRIDES):
        raise unknown_name("setting", name, OVERRIDES)
    network = _one_router(state)
    spec = _spec_of(network, overrides)
    return spec, _renamed(network, spec)


def upstream_name(ours: str, spec: ModelSpec) -> str:
    """Return what the released code calls the tensor that we call ``ours``."""
    name = ours.removeprefix("backbone.")
    if name.startswith("router."):
        return re.sub(
            r"blocks\.(\d+)", lambda m: f"layer{int(m[1]) // 3 + 1}.{int(m[1]) % 3}", name
        )
    if spec.backbone == "vgg16-bn":
        name = re.sub(r"^(convs|norms)\.(\d+)", lambda m: f"features.{_feature(*m.groups())}", name)
        return name.replace("head.", "classifier.")
    if spec.backbone in WIDENING:
        name = re.sub(r"^stages\.(\d)", lambda m: f"block{int(m[1]) + 1}.layer", name)
        name = name.replace("shortcut.", "convShortcut.")
        return re.sub(r"^bn\.", "bn1.", name).replace("linear.", "fc.")
    name = re.sub(r"^stages\.(\d)", lambda m: f"layer{int(m[1]) + 1}", name)
    beside, head = ("shortcut", "linear") if spec.stem == "small" else ("downsample", "fc")
    name = name.replace("shortcut.conv.", f"{beside}.0.").replace("shortcut.bn.", f"{beside}.1.")
    return name.replace("linear.", f"{head}.")


def _feature(kind: str, conv: str) -> int:
    """Return the place of a convolution, or of its BatchNorm, among VGG's features.

    Each convolution takes three (BatchNorm and ReLU follow), each pooling between stages one.
    """
    ends = [sum(count for count, _ in VGG16_STAGES[: n + 1]) for n in range(len(VGG16_STAGES))]
    return 3 * int(conv) + sum(int(conv) >= end for end in ends) + (kind == "norms")


def _one_router(state: StateDict) -> dict[str, Tensor]:
    """Return ``state`` with its router once, as ``router.*``."""
    network: dict[str, Tensor] = {}
    for name, tensor in state.items():
        _, found, inner = f".{name}".rpartition(".router.")
        once = f"router.{inner}" if found else name
        kept = network.get(once, tensor)
        if not _is_same(kept, tensor):
            raise CheckpointError(f"{name} differs from the other copies of the router")
        network[once] = max(kept, tensor, key=Tensor.element_size)
    return network


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two copies agree as far as the less precise of them tells."""
    coarse = min(one, other, key=Tensor.element_size).dtype
    return torch.equal(one.to(coarse), other.to(coarse))


def _spec_of(network: StateDict, overrides: Mapping[str, object]) -> ModelSpec:
    num_experts = shape_of(network, "router.fc.weight", 2)[0]
    told = _network_of(network, num_experts, overrides)
    in_channels = told["in_channels"]
    assert isinstance(in_channels, int)
    fields: dict[str, object] = {
        "family": "advmoe",
        "num_experts": num_experts,
        "router_width": shape_of(network, "router.conv1.weight", 4)[0],
        "mean": (0.0,) * in_channels,
        "std": (1.0,) * in_channels,
    }
    return build_spec(**{**fields, **told, **overrides})


def _network_of(
    network: StateDict, num_experts: int, overrides: Mapping[str, object]
) -> dict[str, object]:
    if "layer1.0.conv1.weight" in network:
        return _resnet(network, num_experts, overrides)
    if "block1.layer.0.conv1.weight" in network:
        return _wide_resnet(network, num_experts, overrides)
    if "features.0.weight" in network:
        return _vgg(network, num_experts, overrides)
    raise CheckpointError(
        "none of layer1.0.conv1.weight (ResNet), block1.layer.0.conv1.weight (WRN) and "
        "features.0.weight (VGG) is there"
    )


def _resnet(
    network: StateDict, num_experts: int, overrides: Mapping[str, object]
) -> dict[str, object]:
    stem, in_channels, kernel, _ = shape_of(network, "conv1.weight", 4)
    counts = tuple(_blocks(network, rf"layer{stage}\.(\d+)\.") for stage in range(1, 5))
    bottleneck = "layer1.0.conv3.weight" in network
    backbone = next(
        (
            name
            for name, (block, of_name) in RESNETS.items()
            if counts == of_name and bottleneck == (block is Bottleneck)
        ),
        None,
    )
    if backbone is None:
        blocks = "-".join(map(str, counts))
        raise CheckpointError(f"a ResNet of {blocks} blocks is none of {', '.join(RESNETS)}")
    small = kernel == 3
    width = stem if small else _width(overrides, backbone)
    firsts = (f"layer{stage}.0.conv1.weight" for stage in range(1, 5))
    widths = [
        (width * 2**stage, _bank(network, name, num_experts)) for stage, name in enumerate(firsts)
    ]
    return {
        "backbone": backbone,
        "stem": "small" if small else "imagenet",
        "width": width,
        "ratio": _ratio(widths if small else [(width, stem), *widths]),
        "in_channels": in_channels,
        "num_classes": shape_of(network, "linear.weight" if small else "fc.weight", 2)[0],
        "image_size": 32 if small else 224,
    }


def _wide_resnet(
    network: StateDict, num_experts: int, overrides: Mapping[str, object]
) -> dict[str, object]:
    stem, in_channels, kernel, _ = shape_of(network, "conv1.weight", 4)
    firsts = [f"block{stage}.layer.0.conv1.weight" for stage in range(1, 4)]
    channels = [_bank(network, name, num_experts) for name in firsts]
    small = kernel == 3
    for backbone, widening in WIDENING.items():
        width = _width(overrides, backbone)
        stages = [(width * 2**stage, count) for stage, count in enumerate(channels)]
        ratio = _simplest([(width // widening, stem), *stages])
        if ratio is not None:
            break
    else:
        raise CheckpointError(
            f"stem and stages of {stem}, {channels} channels are no {' or '.join(WIDENING)}"
        )
    return {
        "backbone": backbone,
        "stem": "small" if small else "imagenet",
        "width": width,
        "ratio": ratio,
        "in_channels": in_channels,
        "num_classes": shape_of(network, "fc.weight", 2)[0],
        "image_size": 32 if small else 224,
    }


def _vgg(
    network: StateDict, num_experts: int, overrides: Mapping[str, object]
) -> dict[str, object]:
    first, in_channels, _, _ = shape_of(network, "features.0.weight", 4)
    width = _width(overrides, "vgg16-bn")
    widths = [(width, first)]
    conv = 0
    for count, multiple in VGG16_STAGES:
        conv += count
        name = f"features.{_feature('convs', str(conv - 1))}.weight"
        widths.append((width * multiple, _bank(network, name, num_experts)))
    pixels = shape_of(network, "classifier.0.weight", 2)[1] // widths[-1][1]
    return {
        "backbone": "vgg16-bn",
        "width": width,
        "ratio": _ratio(widths),
        "in_channels": in_channels,
        "num_classes": shape_of(network, "classifier.4.weight", 2)[0],
        "image_size": max(1, math.isqrt(pixels)) * 2 ** (len(VGG16_STAGES) - 1),
    }


def _width(overrides: Mapping[str, object], backbone: str) -> int:
    width = overrides.get("width", BASE_WIDTH[backbone])
    return width if isinstance(width, int) and width > 0 else BASE_WIDTH[backbone]


def _blocks(network: StateDict, pattern: str) -> int:
    return len({m[1] for m in (re.match(pattern, name) for name in network) if m})


def _bank(network: StateDict, name: str, num_experts: int) -> int:
    """Return the output channels of one expert of a bank."""
    rows = shape_of(network, name, 4)[0]
    if rows % num_experts:
        raise CheckpointError(
            f"{name} has {rows} output channels, which {num_experts} experts cannot share evenly"
        )
    return rows // num_experts


def _ratio(widths: Widths) -> float:
    ratio = _simplest(widths)
    if ratio is None:
        text = ", ".join(f"{count} of {full}" for full, count in widths)
        raise CheckpointError(f"no one ratio makes {text} channels")
    return ratio


def _simplest(widths: Widths) -> float | None:
    """Return a ratio that scales every full width as it is found, the plainest there is.

    Many do, for widths are rounded down: the exact proportion, if it is one for all, or the one
    with the fewest decimals.
    """
    # One channel may also be the least that there can be.
    proportions = [Fraction(count, full) for full, count in widths if count > 1]
    low = max(proportions, default=Fraction(1, widths[-1][0]))
    rounded_up = (float(math.ceil(low * 10**digits) / 10**digits) for digits in range(1, 18))
    candidates = [float(low), *rounded_up] if len({*proportions}) == 1 else [*rounded_up]
    for ratio in candidates:
        if ratio <= 1 and all(count == max(1, scaled(full, ratio)) for full, count in widths):
            return ratio
    return None


def _renamed(network: StateDict, spec: ModelSpec) -> dict[str, Tensor]:
    """Return the tensors of ``network`` under our names, each checked against ``spec``."""
    with torch.device("meta"):
        expected = build_model(spec).state_dict()
    renamed: dict[str, Tensor] = {}
    left = dict(network)
    for ours, like in expected.items():
        theirs = upstream_name(ours, spec)
        tensor = left.pop(theirs, None)
        if tensor is None:
            raise CheckpointError(f"{theirs} is missing")
        if tensor.shape != like.shape:
            raise CheckpointError(f"{theirs} is {[*tensor.shape]}, not {[*like.shape]}")
        renamed[ours] = tensor
    odd = sorted(name for name in left if not _is_unused(name, expected, spec))
    if odd:
        raise CheckpointError(f"{odd[0]} has no place in a {spec.backbone}")
    return renamed


def _is_unused(name: str, ours: StateDict, spec: ModelSpec) -> bool:
    """Return whether this is the BatchNorm before a shortcut, which the released WRN never uses."""
    unused = re.match(r"block(\d)\.layer\.0\.bn1\.", name)
    return bool(
        unused
        and spec.backbone in WIDENING
        and f"backbone.stages.{int(unused[1]) - 1}.0.shortcut.weight" in ours
    )

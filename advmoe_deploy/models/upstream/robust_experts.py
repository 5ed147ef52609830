"""Checkpoints of the released Robust Experts code (arXiv 2509.05086), read into ours.

Names and shapes tell everything but ``top_k`` (1 unless said), the weighting (by default the
straight-through gate's for one expert per image, renormalised for more), the image size and the
normalisation, which there belongs to the data. Other parts of a Lightning module,
such as the attack's own view of the network, are left out.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from advmoe_deploy.errors import CheckpointError, unknown_name
from advmoe_deploy.families import BLOCKS_PER_STAGE, ExpertKind, shortest_prefixes
from advmoe_deploy.models.upstream.shapes import shape_of
from advmoe_deploy.models.upstream.wrappers import Signature
from advmoe_deploy.specs import ModelSpec, build_spec

# What the file cannot tell.
OVERRIDES = ("top_k", "weighting", "gate", "image_size", "mean", "std")
SIGNATURE = Signature((("conv1.weight", "fc.weight"),), parts=frozenset({"router"}))

_BANK = re.compile(r"(layer\d\.\d+(?:\.(?:conv\d|downsample\.0))?)\.experts\.(\d+)\.")
_SHIFTED = "gate.network."
_SUPPORT = "support_vectors"


def convert(
    state: Mapping[str, Tensor], overrides: Mapping[str, object]
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Return the spec of a released network and its weights under our names.

    Args:
        state: the ``state_dict`` of the Lightning checkpoint, or of the network alone.
        overrides: fields of the spec that the file does not tell, see :data:`OVERRIDES`.

    Raises:
        CheckpointError: this is no ResNet of Robust Experts.
        UsageError: an override is unknown or makes no sense.
    """
    for name in overrides.keys() - set(OVERRIDES):
        raise unknown_name("setting", name, OVERRIDES)
    network = _network(state)
    banks = _banks(network)
    spec = _spec_of(network, banks, dict(overrides))
    return spec, {_our_name(n): t for n, t in network.items()} | _selections(network, banks, spec)


def _network(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the ResNet itself, under torchvision's names."""
    prefix = ""
    while f"{prefix}conv1.weight" not in state:
        prefix += "model."
        if not any(name.startswith(prefix) for name in state):
            raise CheckpointError("no conv1.weight in this file; it holds no ResNet")
    network = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    if "fc.weight" not in network:
        raise CheckpointError("no fc.weight in this file; it holds no ResNet of torchvision's form")
    return network


def _banks(network: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of experts of each bank."""
    banks: dict[str, int] = {}
    for match in filter(None, map(_BANK.match, network)):
        banks[match[1]] = max(banks.get(match[1], 0), int(match[2]) + 1)
    kinds = {name.count(".") == 1 for name in banks}
    if not banks or len(kinds) > 1 or len(set(banks.values())) > 1:
        found = ", ".join(f"{name} ({count})" for name, count in banks.items()) or "none"
        raise CheckpointError(f"not one kind and number of experts in every bank: {found}")
    return banks


def _spec_of(
    network: Mapping[str, Tensor], banks: Mapping[str, int], overrides: dict[str, object]
) -> ModelSpec:
    backbone = _backbone_of(network)
    first = next(iter(banks))
    kind: ExpertKind = "block" if first.count(".") == 1 else "conv"
    width, in_channels, kernel, _ = shape_of(network, "conv1.weight", 4)
    top_k = overrides.setdefault("top_k", 1)
    layers = {
        "kind": kind,
        "layers": shortest_prefixes(backbone, kind, set(banks)),
        "gate": overrides.pop("gate", None) or _gate_of(network, first),
    }
    told: dict[str, object] = {
        "family": "robust-experts",
        "backbone": backbone,
        "num_classes": shape_of(network, "fc.weight", 2)[0],
        "num_experts": banks[first],
        "weighting": "one" if str(top_k) == "1" else "renormalised",
        "width": width,
        "in_channels": in_channels,
        "image_size": 32 if kernel == 3 else 224,
        "stem": "small" if kernel == 3 else "imagenet",
        "mean": (0.0,) * in_channels,
        "std": (1.0,) * in_channels,
        "expert_layers": layers,
    }
    return build_spec(**{**told, **overrides})


def _backbone_of(network: Mapping[str, Tensor]) -> str:
    blocks: list[set[str]] = [set() for _ in range(4)]
    for match in filter(None, (re.match(r"layer([1-4])\.(\d+)\.", name) for name in network)):
        blocks[int(match[1]) - 1].add(match[2])
    counts = tuple(len(stage) for stage in blocks)
    bottleneck = any(".conv3." in name for name in network)
    for backbone, expected in BLOCKS_PER_STAGE.items():
        if counts == expected and bottleneck == (backbone == "resnet50"):
            return backbone
    kind = "bottlenecks" if bottleneck else "basic blocks"
    raise CheckpointError(
        f"a ResNet of {'-'.join(map(str, counts))} {kind} is none of {', '.join(BLOCKS_PER_STAGE)}"
    )


def _gate_of(network: Mapping[str, Tensor], bank: str) -> str:
    start = f"{bank}.{_SHIFTED}"
    tensors = {n.removeprefix(start): t for n, t in network.items() if n.startswith(start)}
    if not tensors:
        return "fixed-conv-gap"
    if _SUPPORT in tensors:
        return "fixed-gap-fc"
    if "0.weight" not in tensors:
        return "gap-fc"
    if "2.weight" in tensors:
        return "double-conv"
    return "conv-gap" if shape_of(tensors, "0.weight", 4)[-1] == 1 else "conv3-gap"


def _our_name(name: str) -> str:
    return name.replace(_SHIFTED, "gate.").replace(_SUPPORT, "2.weight")


def _selections(
    network: Mapping[str, Tensor], banks: Mapping[str, int], spec: ModelSpec
) -> dict[str, Tensor]:
    """Return the weights of gates that have none in the file: channel e scores expert e."""
    layers = spec.expert_layers
    if layers is None or layers.gate != "fixed-conv-gap":
        return {}
    selections = {}
    for bank, experts in banks.items():
        inner = "" if layers.kind == "conv" else "conv1."
        channels = shape_of(network, f"{bank}.experts.0.{inner}weight", 4)[1]
        selections[f"{bank}.gate.0.weight"] = torch.eye(experts, channels)[:, :, None, None]
    return selections

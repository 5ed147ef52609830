"""Checkpoints of the released dual-model code (arXiv 2502.06832), read into ours.

Names and shapes tell everything but the share of the robust model (``alpha``, 0.7 unless said) and
the normalisation, which there belongs to the data. A file of one mixture becomes expert networks, a
file of two a dual model. Each expert is a ResNet-18 for small images.
"""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from advmoe_deploy.errors import CheckpointError, unknown_name
from advmoe_deploy.models.backbones.resnet import BasicBlock
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.upstream.shapes import shape_of
from advmoe_deploy.models.upstream.wrappers import Signature
from advmoe_deploy.specs import ModelSpec, build_spec

# What the file cannot tell.
OVERRIDES = ("alpha", "mean", "std")
SIGNATURE = Signature(
    tuple((f"{part}router.gate.weight",) for part in ("", "Smoe.", "Rmoe.")),
    parts=frozenset({"Smoe", "Rmoe"}),
)

_ALPHA = 0.7
_PARALLEL = "module."
_PARTS = {"Smoe.": "standard.", "Rmoe.": "robust."}
_GATE = "router.gate.weight"
_STEM = "experts.0.net.conv1.weight"
_HEAD = "experts.0.net.linear.weight"
# What our ResNet calls the convolution and the BatchNorm of a shortcut; they number them.
_SHORTCUT = tuple(
    name for name, _ in BasicBlock(1, 2, 2, 1).get_submodule("shortcut").named_children()
)


def convert(
    state: Mapping[str, Tensor], overrides: Mapping[str, object]
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Return the spec of a released network and its weights under our names.

    Args:
        state: the tensors under ``net`` of a ``.t7`` file, from DataParallel or not.
        overrides: fields of the spec that the file does not tell, see :data:`OVERRIDES`.

    Raises:
        CheckpointError: this is no mixture of ResNet-18 experts, and no pair of such.
        UsageError: an override is unknown or makes no sense.
    """
    for name in overrides.keys() - set(OVERRIDES):
        raise unknown_name("setting", name, OVERRIDES)
    network = {name.removeprefix(_PARALLEL): tensor for name, tensor in state.items()}
    spec = _spec_of(network, dict(overrides))
    ours = {_our_name(name): tensor for name, tensor in network.items()}
    _require_fit(spec, ours)
    return spec, ours


def _spec_of(network: Mapping[str, Tensor], overrides: dict[str, object]) -> ModelSpec:
    prefix = next((part for part in _PARTS if f"{part}{_GATE}" in network), "")
    for name in (_GATE, _STEM, _HEAD):
        if f"{prefix}{name}" not in network:
            raise CheckpointError(f"no {prefix}{name} in this file; it holds no mixture of ResNets")
    num_experts, pixels = shape_of(network, f"{prefix}{_GATE}", 2)
    width, in_channels, _, _ = shape_of(network, f"{prefix}{_STEM}", 4)
    image_size = math.isqrt(pixels // in_channels)
    if in_channels * image_size**2 != pixels:
        raise CheckpointError(
            f"a router for {pixels} values is none for square images of {in_channels} channels"
        )
    told: dict[str, object] = {
        "family": "dual-model" if prefix else "expert-networks",
        "num_classes": shape_of(network, f"{prefix}{_HEAD}", 2)[0],
        "num_experts": num_experts,
        "width": width,
        "in_channels": in_channels,
        "image_size": image_size,
        "mean": (0.0,) * in_channels,
        "std": (1.0,) * in_channels,
        **({"alpha": _ALPHA} if prefix else {}),
    }
    return build_spec(**{**told, **overrides})


def _our_name(name: str) -> str:
    for theirs, ours in _PARTS.items():
        if name.startswith(theirs):
            return ours + _our_name(name.removeprefix(theirs))
    name = re.sub(r"^router\.gate\.", "router.", name)
    name = re.sub(r"^(experts\.\d+)\.net\.", r"\1.", name)
    name = re.sub(r"\.layer([1-4])\.", lambda m: f".stages.{int(m[1]) - 1}.", name)
    return re.sub(r"\.shortcut\.([01])\.", lambda m: f".shortcut.{_SHORTCUT[int(m[1])]}.", name)


def _require_fit(spec: ModelSpec, ours: Mapping[str, Tensor]) -> None:
    """Raise where tensors are missing, left over, or of another shape than ``spec`` says."""
    expected = build_model(spec).state_dict()
    odd = sorted(expected.keys() ^ ours.keys())
    odd += [name for name in expected if name in ours and expected[name].shape != ours[name].shape]
    if odd:
        raise CheckpointError(
            f"this is not {spec.num_experts} ResNet-18 of width {spec.width} behind each router: "
            f"{len(odd)} tensors differ, first {odd[0]}"
        )

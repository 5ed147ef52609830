"""Importer of the papers' own checkpoints, without running code that they hold.

Each family has a converter from names and shapes to a spec and our weights; this module reads the
file, finds the network in it, chooses the converter, and checks what comes out.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from advmoe_deploy.errors import CheckpointError, UsageError, unknown_name
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import require_finite
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.upstream import advmoe as upstream_advmoe
from advmoe_deploy.models.upstream import dual as upstream_dual
from advmoe_deploy.models.upstream import robust_experts as upstream_robust_experts
from advmoe_deploy.models.upstream.files import content_of
from advmoe_deploy.models.upstream.normalisation import normalisation_of
from advmoe_deploy.models.upstream.wrappers import Signature, flattened, network_in, roots_of
from advmoe_deploy.specs import ModelSpec

Converter = Callable[
    [Mapping[str, Tensor], Mapping[str, object]], tuple[ModelSpec, dict[str, Tensor]]
]

IMPORTERS: dict[str, Converter] = {
    "advmoe": upstream_advmoe.convert,
    "robust-experts": upstream_robust_experts.convert,
    "dual-model": upstream_dual.convert,
}
_SIGNATURES: dict[str, Signature] = {
    "advmoe": upstream_advmoe.SIGNATURE,
    "robust-experts": upstream_robust_experts.SIGNATURE,
    "dual-model": upstream_dual.SIGNATURE,
}
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool})
_COUNT = "num_batches_tracked"


@dataclass(frozen=True)
class Imported:
    """A released checkpoint's spec and model, in eval mode, with what was done to get there.

    ``unwrapped`` are the keys and prefixes around the network's names, ``left_out`` the places in
    the file that were not read. ``normalisation`` names the tensors that the spec's mean and std
    come from. ``converted`` counts the tensors per dtype that became float32, ``filled`` the
    BatchNorms without a count of batches, which are given 0.
    """

    spec: ModelSpec
    model: Classifier
    unwrapped: tuple[str, ...]
    left_out: tuple[str, ...]
    normalisation: tuple[str, ...]
    converted: Mapping[str, int]
    filled: int

    def report(self) -> dict[str, object]:
        """Return what was done, as JSON takes it."""
        return {
            "unwrapped": [*self.unwrapped],
            "left_out": [*self.left_out],
            "normalisation": [*self.normalisation],
            "converted_to_float32": dict(self.converted),
            "batch_counts_set_to_0": self.filled,
        }


def read_released(
    file: Path, source: str, overrides: Mapping[str, object], key: str = ""
) -> Imported:
    """Return what a released checkpoint holds.

    Args:
        file: a file of ``torch.save`` (.pth, .pt, .ckpt, .t7) or of safetensors.
        source: whose code wrote it, a name in :data:`IMPORTERS`.
        overrides: what names and shapes cannot tell, see
            :func:`~advmoe_deploy.settings.parse_settings`.
        key: where the network is in a file of several, such as ``state_dict.ema_model``.

    Raises:
        CheckpointError: the file is missing or damaged, needs code to be read, holds another
            family's network, several and no ``key``, lacks tensors, has odd ones, or holds values
            that are not finite.
        UsageError: ``source``, ``key`` or an override is unknown or makes no sense.
    """
    if source not in IMPORTERS:
        raise unknown_name("source", source, IMPORTERS)
    tensors = flattened(content_of(file), str(file))
    network = network_in(tensors, _SIGNATURES[source], key, str(file))
    normalisation = normalisation_of(tensors, network, str(file))
    used = normalisation.names if normalisation else ()
    state = {plain: tensors[name] for plain, name in network.names.items() if name not in used}
    _require_numbers(state, str(file))
    counts = _missing_counts(state)
    try:
        spec, weights = IMPORTERS[source](state | counts, overrides)
        if normalisation:
            spec = normalisation.applied_to(spec, overrides)
        model = _model_of(spec, weights)
    except CheckpointError as error:
        hint = _other_sources(tensors, source)
        raise CheckpointError(f"{file} is no checkpoint of {source}: {error}{hint}") from None
    dtypes = (t.dtype for t in state.values() if t.is_floating_point())
    return Imported(
        spec=spec,
        model=model,
        unwrapped=network.unwrapped(),
        left_out=network.left_out(tensors, used),
        normalisation=used,
        converted=Counter(str(d).removeprefix("torch.") for d in dtypes if d != torch.float32),
        filled=len(counts),
    )


def _require_numbers(state: Mapping[str, Tensor], file: str) -> None:
    """Raise where a tensor holds no plain numbers, or one that is not finite as float32."""
    for name, tensor in state.items():
        odd = tensor.is_meta or tensor.layout != torch.strided
        if odd or tensor.dtype not in _FLOATS | _INTEGERS:
            kind = "without values" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
            raise CheckpointError(
                f"{file}: {name} is {kind}; save the weights as dense float32 and import those"
            )
    require_finite({n: t.float() for n, t in state.items() if t.dtype in _FLOATS}, file)


def _missing_counts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a count of 0 batches for each BatchNorm that has none, as older torch wrote them."""
    norms = (n.removesuffix("running_var") for n in state if n.endswith(".running_var"))
    return {f"{n}{_COUNT}": torch.tensor(0) for n in norms if f"{n}{_COUNT}" not in state}


def _model_of(spec: ModelSpec, weights: Mapping[str, Tensor]) -> Classifier:
    model = build_model(spec)
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise CheckpointError(f"{name} is missing")
        if name not in expected:
            raise CheckpointError(f"{name} has no place in a {spec.backbone}")
        if expected[name].shape != weights[name].shape:
            found, wanted = [*weights[name].shape], [*expected[name].shape]
            raise CheckpointError(f"{name} is {found}, not {wanted}")
        if expected[name].is_floating_point() and not weights[name].is_floating_point():
            raise CheckpointError(f"{name} is {weights[name].dtype}, not floating-point")
    model.load_state_dict(dict(weights))
    return model.eval()


def _other_sources(tensors: Mapping[str, Tensor], source: str) -> str:
    if any("flat_param" in name for name in tensors):
        return "; it is flattened by FSDP: save it with StateDictType.FULL_STATE_DICT"
    for other in IMPORTERS.keys() - {source}:
        for root in roots_of(tensors, _SIGNATURES[other])[:1]:
            try:
                network = network_in(tensors, _SIGNATURES[other], root or ".", "")
                state = {plain: tensors[name] for plain, name in network.names.items()}
                IMPORTERS[other](state | _missing_counts(state), {})
            except (CheckpointError, UsageError):
                continue
            return f"; it looks like --from {other}"
    return ""

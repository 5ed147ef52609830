"""The papers' own checkpoints, read into ours without running a line of what they hold.

Each family has a converter from names and shapes to a spec and our weights; this module reads the
files, chooses the converter, and checks what comes out.
"""

import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from advmoe_deploy.errors import CheckpointError, UsageError, unknown_name
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import require_finite
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.upstream import advmoe as upstream_advmoe
from advmoe_deploy.models.upstream import dual as upstream_dual
from advmoe_deploy.models.upstream import robust_experts as upstream_robust_experts
from advmoe_deploy.specs import ModelSpec

Converter = Callable[
    [Mapping[str, Tensor], Mapping[str, object]], tuple[ModelSpec, dict[str, Tensor]]
]

IMPORTERS: dict[str, Converter] = {
    "advmoe": upstream_advmoe.convert,
    "robust-experts": upstream_robust_experts.convert,
    "dual-model": upstream_dual.convert,
}

# Under which key a file keeps its weights, if not at the top.
_WRAPPERS = ("state_dict", "net", "model_state_dict")
# What wrappers put into the names: DataParallel, torch.compile.
_WRAPPED = {"module", "_orig_mod"}
_scalar = np.float64(0).__reduce__()[0]
# Numbers of numpy, which training scripts like to keep beside the weights; no more than data.
_HARMLESS: list[Any] = [
    np.dtype,
    *{type(np.dtype(code)) for code in "fdiql?"},
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def import_checkpoint(
    file: Path, source: str, overrides: Mapping[str, object]
) -> tuple[ModelSpec, Classifier]:
    """Return the spec and the model, in eval mode, of a released checkpoint.

    Args:
        file: a file of ``torch.save`` (.pth, .pt, .ckpt, .t7) or of safetensors.
        source: whose code wrote it, a name in :data:`IMPORTERS`.
        overrides: what names and shapes cannot tell, see :func:`parse_settings`.

    Raises:
        CheckpointError: the file is missing or damaged, needs code to be read, holds another
            family's network, lacks tensors, has odd ones, or holds values that are not finite.
        UsageError: ``source`` or an override is unknown or makes no sense.
    """
    if source not in IMPORTERS:
        raise unknown_name("source", source, IMPORTERS)
    state = read_tensors(file)
    require_finite(state, str(file))
    try:
        spec, weights = IMPORTERS[source](state, overrides)
        return spec, _model_of(spec, weights)
    except CheckpointError as error:
        hint = _other_sources(state, source)
        raise CheckpointError(f"{file} is no checkpoint of {source}: {error}{hint}") from None


def parse_settings(settings: Iterable[str]) -> dict[str, object]:
    """Return what ``--set key=value`` says: numbers, lists such as ``0.5,0.4,0.3``, or text.

    Raises:
        UsageError: a setting is no ``key=value``.
    """
    parsed: dict[str, object] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not key or not equals or not text:
            raise UsageError(f"--set '{setting}' is no KEY=VALUE; write image_size=64")
        parsed[key] = _value(text, as_list=key in ("mean", "std"))
    return parsed


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file by name; wrappers' parts of the names are left out.

    A router that the file keeps apart is found under ``router.``.

    Raises:
        CheckpointError: the file is missing, no checkpoint, or no state dict.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is no file; name a checkpoint of the released code")
    content = _read_safetensors(file) if _is_safetensors(file) else _read_torch(file)
    state = next((content[key] for key in _WRAPPERS if key in content), content)
    tensors = _tensors(state, "", file)
    if isinstance(content.get("router"), Mapping):
        tensors |= _tensors(content["router"], "router.", file)
    return tensors


def _tensors(state: object, prefix: str, file: Path) -> dict[str, Tensor]:
    named = dict(state) if isinstance(state, Mapping) else {}
    tensors: dict[str, Tensor] = {}
    for name, value in named.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            plain = prefix + ".".join(part for part in name.split(".") if part not in _WRAPPED)
            if plain in tensors:
                raise CheckpointError(f"{file} holds {plain} twice; which one is meant?")
            tensors[plain] = value
    if not tensors:
        found = ", ".join(list(map(str, named))[:5]) or type(state).__name__
        raise CheckpointError(f"{file} holds no tensors by name, but {found}; name a checkpoint")
    return tensors


def _is_safetensors(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(9)[8:] == b"{"  # eight bytes of length, then JSON


def _read_safetensors(file: Path) -> dict[str, Any]:
    try:
        return dict(load_file(file))
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read: {error}; copy it again") from None


def _read_torch(file: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged bytes raise whatever they happen to mean
        raise _not_read(file, error) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds one {type(content).__name__}, not weights by name")
    return dict(content)


def _not_read(file: Path, error: Exception) -> CheckpointError:
    code = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
    if isinstance(error, pickle.UnpicklingError) and code:
        return CheckpointError(
            f"{file} needs the code of {code[1]} to be read, which is not run here; where you "
            "trust it, save its state_dict alone (torch.save) and import that"
        )
    return CheckpointError(
        f"{file} is no file of torch.save or safetensors, or it is damaged; copy it again"
    )


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
    model.load_state_dict(dict(weights))
    return model.eval()


def _other_sources(state: Mapping[str, Tensor], source: str) -> str:
    for other in IMPORTERS.keys() - {source}:
        try:
            IMPORTERS[other](state, {})
        except (CheckpointError, UsageError):
            continue
        return f"; it looks like --from {other}"
    return ""


def _value(text: str, *, as_list: bool) -> object:
    try:
        values = json.loads(f"[{text}]")
    except json.JSONDecodeError:
        return text
    return tuple(values) if as_list or len(values) > 1 else values[0]
